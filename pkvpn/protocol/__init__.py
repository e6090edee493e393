"""Pure codecs of the SoftEther SSL-VPN protocol, shared by the edge, the core and our client.

Strategy: bytes in, objects out, and the other way round.  No sockets, clocks or
randomness; what a codec needs to know is passed in.  Whatever a peer sends, the
only exception that leaves a decoder is `errors.ProtocolError`.
"""
