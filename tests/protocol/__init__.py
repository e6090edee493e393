"""Codecs: each case whole, byte by byte and with a tail."""
