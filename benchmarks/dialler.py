"""A client that logs in and leaves with as little work of its own as possible.

Strategy: what is the same in every login is made once, with our own client's codecs: both requests
as they go over the wire, with a place for the hash that answers the server's random.  The rest is
what any client does, a stock one too: TCP connection, TLS 1.3 handshake, signature, Hello, login
with the SHA-0 answer, welcome, close_notify.  No certificate is checked (stock clients check none
by default) and no TLS session is resumed (they resume none).
"""

from __future__ import annotations

import socket
import ssl

from pkvpn.client.machine import Credentials
from pkvpn.protocol import http
from pkvpn.protocol.hashes import HASH_SIZE, RANDOM_SIZE, secure_password
from pkvpn.protocol.pack import Pack

# In the middle of the padding that the originals add (SoftEther: "pencore"), whose size changes.
_PADDING = 500
_END_OF_HEAD = b"\r\n\r\n"
_LENGTH = b"content-length:"


class Dialler:
    """Logs in as one user again and again; one connection at a time, blocking."""

    def __init__(self, host: str, port: int, hub: str, user: str, password: str) -> None:
        self._address = (host, port)
        credentials = Credentials.with_password(hub, user, password)
        self._key = credentials.key
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.check_hostname = False
        self._context.verify_mode = ssl.CERT_NONE
        self._signature = http.build_request(
            "POST", http.CONNECT_TARGET, host=host, content_type=http.IMAGE_TYPE,
            body=http.SIGNATURE,
        )  # fmt: skip
        pack = credentials.login(bytes(RANDOM_SIZE)).to_pack()
        place = pack.get_data("secure_password")
        pack.put_data("pencore", bytes(_PADDING))
        login = http.build_request(
            "POST", http.VPN_TARGET, host=host, content_type=http.PACK_TYPE, body=pack.encode()
        )
        self._before, self._after = login.split(place)
        assert len(place) == HASH_SIZE

    def log_in(self, timeout: float) -> None:
        """One login, from the first packet to close_notify.

        Raises OSError (TLS and time-outs included) or RuntimeError with what the server said.
        """
        with socket.create_connection(self._address, timeout) as plain:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._context.wrap_socket(plain) as tls:
                tls.sendall(self._signature)
                hello = Pack.decode(_body(tls))
                answer = secure_password(self._key, hello.get_data("random"))
                tls.sendall(self._before + answer + self._after)
                # Its many values are not looked at, as what is measured is the server.
                welcome = _body(tls)
                if b"session_key" not in welcome:
                    raise RuntimeError(f"no welcome but {Pack.decode(welcome)!r}")
                tls.setblocking(False)
                try:
                    tls.unwrap()
                except OSError:
                    pass  # the goodbye is sent; what comes back is not waited for


def _body(tls: ssl.SSLSocket) -> bytes:
    """The body of the next response."""
    data = tls.recv(16384)
    while True:
        head, found, body = data.partition(_END_OF_HEAD)
        if found:
            size = int(head.lower().partition(_LENGTH)[2].partition(b"\r\n")[0])
            if len(body) >= size:
                if not head.startswith(b"HTTP/1.1 200"):
                    raise RuntimeError(f"no pack but {head[:40]!r}")
                return body[:size]
        more = tls.recv(16384)
        if not more:
            raise ConnectionError(f"closed after {len(data)} bytes of a response")
        data += more
