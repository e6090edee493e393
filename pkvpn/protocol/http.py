"""The HTTP-like phase before the data phase: cutting, reading and writing messages.

Strategy: strict and early.  Each line is judged when it is whole, a line or a body that
is announced too long is refused before it arrives, and what no client of the protocol
sends (chunked bodies, folded headers, two lengths) is refused altogether, so that there is
one way only to find the end of a message.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field

from pkvpn.protocol.errors import ProtocolError

MAX_LINE = 4096  # HTTP_HEADER_LINE_MAX_SIZE
MAX_HEADERS = 128  # HTTP_HEADER_MAX_LINES
MAX_HEAD = 16384  # a stock client's head is below 1 KiB
MAX_BODY = 65536  # MAX_PACK_SIZE before login
MAX_RESPONSE_BODY = 1048575  # what the stock client takes for the probe

# What a VPN client asks for, and with which type the packs travel.
CONNECT_TARGET = "/vpnsvc/connect.cgi"  # HTTP_VPN_TARGET2
VPN_TARGET = "/vpnsvc/vpn.cgi"  # HTTP_VPN_TARGET
PACK_TYPE = "application/octet-stream"  # HTTP_CONTENT_TYPE2
IMAGE_TYPE = "image/jpeg"  # HTTP_CONTENT_TYPE3

# A stock client looks for this in the first 1023 bytes of the answer to its first `GET /`
# and takes the server for something else without it.
PROBE_MARK = "9C37197CA7C2428388C2E6E59B829B30"

# The whole body of the request that tells a VPN client from a browser, in the form that
# is not an image (SoftEther: HTTP_VPN_TARGET_POSTDATA).
SIGNATURE = b"VPNCONNECT"
# The other form is a constant image with up to 1999 random bytes behind it; its content is
# not worth holding here, its kind and size are enough.
_IMAGE = b"GIF89a"
_IMAGE_SIZES = range(1411, 3411 + 1)

_PRINTABLE = re.compile(rb"[\x20-\x7e]*\Z")
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+\Z")
_DIGITS = re.compile(r"[0-9]{1,10}\Z")

_REASONS = {
    200: "OK",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    501: "Not Implemented",
}
_EXPLANATIONS = {
    401: "This server does not know who you are.",
    403: "You may not see {target} here.",
    404: "There is no {target} here.",
    501: "This server does not do {method}.",
}


@dataclass(frozen=True, slots=True)
class Request:
    """One whole request; names of headers are in lower case, the last of a name counts."""

    method: str
    target: str
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Response:
    """One whole response; names of headers are in lower case."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def is_pack(self) -> bool:
        """Does it carry a pack, as a stock client would judge it?"""
        kind = self.headers.get("content-type", "")
        return self.status == 200 and kind.lower() == PACK_TYPE and bool(self.body)


class _Cutter:
    """Finds the ends of the messages in a stream of bytes."""

    __slots__ = (
        "_body_at",
        "_buffer",
        "_length",
        "_line_at",
        "_lines",
        "_max_body",
        "_max_head",
        "_scanned",
    )

    def __init__(self, *, max_body: int, max_head: int) -> None:
        self._max_body = max_body
        self._max_head = max_head
        self._buffer = bytearray()
        self._restart()

    def _restart(self) -> None:
        self._line_at = 0  # where the line that is not whole yet begins
        self._scanned = 0  # up to here there is no end of that line
        self._lines = 0  # whole lines of the head so far, the first one included
        self._body_at = 0  # 0: the head is not whole
        self._length: int | None = None

    def rest(self) -> bytes:
        """Take what is behind the last whole message."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        self._restart()
        return rest

    def _cut(self) -> bytes | None:
        """The next whole message, or None; to be called again until None."""
        buffer = self._buffer
        while not self._body_at:
            end = buffer.find(b"\n", self._scanned)
            seen = len(buffer) if end < 0 else end + 1
            line = bytes(buffer[self._line_at : seen]).removesuffix(b"\n").removesuffix(b"\r")
            if len(line) > MAX_LINE:
                raise ProtocolError(f"line of a head is longer than {MAX_LINE} bytes")
            if seen > self._max_head:
                raise ProtocolError(f"head is larger than {self._max_head} bytes")
            if end < 0:
                self._scanned = seen
                if not self._lines:
                    # Random bytes need not hold a line's end for a long time.
                    _check_printable(line)
                return None
            self._line_at = self._scanned = end + 1
            self._line(line)
        whole = self._body_at + (self._length or 0)
        if len(buffer) < whole:
            return None
        message = bytes(buffer[:whole])
        del buffer[:whole]
        self._restart()
        return message

    def _line(self, line: bytes) -> None:
        self._lines += 1
        if self._lines == 1:
            self._check_first_line(line)
        elif not line:
            self._body_at = self._line_at
            self._check_head_end()
        elif self._lines - 1 > MAX_HEADERS:
            raise ProtocolError(f"head has more than {MAX_HEADERS} headers")
        else:
            name, value = _header(line)
            if name == "transfer-encoding":
                raise ProtocolError(f"transfer encoding {value[:40]!r} is not spoken here")
            if name == "content-length":
                self._check_length(value)

    def _check_length(self, value: str) -> None:
        if not _DIGITS.match(value):
            raise ProtocolError(f"{value[:40]!r} is not a length of a body")
        length = int(value)
        if self._length not in (None, length):
            raise ProtocolError(f"two lengths of one body: {self._length} and {length}")
        if length > self._max_body:
            raise ProtocolError(f"body of {length} bytes, at most {self._max_body}")
        self._length = length

    def _check_first_line(self, line: bytes) -> None:
        raise NotImplementedError

    def _check_head_end(self) -> None:
        """To be called when the head is whole."""


class RequestCutter(_Cutter):
    """Cuts one connection's bytes into whole requests, for the server.

    ``max_body`` and ``max_head`` bound what one request may have; how long it may take is
    the caller's to say.  Whatever the peer sends, the only exception that leaves ``feed``
    and ``first`` is `ProtocolError`; the cutter is of no use after it.
    """

    __slots__ = ()

    def __init__(self, *, max_body: int = MAX_BODY, max_head: int = MAX_HEAD) -> None:
        super().__init__(max_body=max_body, max_head=max_head)

    def feed(self, data: bytes) -> list[bytes]:
        """Return the requests that are whole now, head and body as they came."""
        requests = []
        request = self.first(data)
        while request is not None:
            requests.append(request)
            request = self.first(b"")
        return requests

    def first(self, data: bytes) -> bytes | None:
        """The next request if it is whole; what is behind it is not looked at.

        For who answers one at a time: a stranger may send thousands at once, each of them costs
        some microseconds, and what follows the last one is no request.
        """
        self._buffer += data
        return self._cut() if self._buffer else None

    def _check_first_line(self, line: bytes) -> None:
        _request_line(line)


class ResponseCutter(_Cutter):
    """Cuts one connection's bytes into responses, for the client.

    One at a time, since what follows the last response is the data phase: `feed`, then
    `cut`, then `rest` when the phase changes.  Raises `ProtocolError` as `RequestCutter`.
    """

    __slots__ = ()

    def __init__(self, *, max_body: int = MAX_RESPONSE_BODY) -> None:
        super().__init__(max_body=max_body, max_head=MAX_HEAD)

    def feed(self, data: bytes) -> None:
        """Add bytes as they came."""
        self._buffer += data

    def cut(self) -> Response | None:
        """The next response if it is whole."""
        message = self._cut() if self._buffer else None
        return None if message is None else _parse_response(message)

    def _check_first_line(self, line: bytes) -> None:
        _status_line(line)

    def _check_head_end(self) -> None:
        if self._length is None:
            raise ProtocolError("response without the length of its body")


def parse_request(raw: bytes) -> Request:
    """Read one whole request as `RequestCutter` cut it."""
    first, headers, body = _parse(raw)
    method, target = _request_line(first)
    if len(body) != _announced(headers):
        raise ProtocolError(f"request announces {_announced(headers)} bytes, has {len(body)}")
    return Request(method, target, headers, body)


def is_signature(body: bytes) -> bool:
    """Is this the body by which a VPN client makes itself known?"""
    return body == SIGNATURE or (body.startswith(_IMAGE) and len(body) in _IMAGE_SIZES)


# Writing, for the server


def build_response(status: int, content_type: str, body: bytes) -> bytes:
    """One whole response on a connection that stays open."""
    return (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\n"
        "Connection: Keep-Alive\r\n"
        f"Content-Length: {len(body)}\r\n"
        f"Content-Type: {content_type}\r\n"
        "Keep-Alive: timeout=15; max=19\r\n"
        "\r\n"
    ).encode("ascii") + body


def build_pack_response(pack: bytes) -> bytes:
    """The response that carries a pack."""
    return build_response(200, PACK_TYPE, pack)


def build_probe_page() -> bytes:
    """The answer to `GET /`, with the mark that stock clients look for."""
    page = _page("VPN server", "This is a VPN server.", f"<!-- {PROBE_MARK} -->\r\n")
    return build_response(200, _PAGE_TYPE, page)


def build_error_page(status: int, method: str, target: str) -> bytes:
    """A whole response that refuses ``method`` on ``target`` with 401, 403, 404 or 501.

    As in the original a HEAD gets the page too; a client that trusts the RFC instead will
    be out of step, and is no client of ours.
    """
    shown = target.replace("<", "(").replace(">", ")")[:200]
    text = _EXPLANATIONS[status].format(target=html.escape(shown), method=html.escape(method[:200]))
    page = _page(f"{status} {_REASONS[status]}", text, "")
    return build_response(status, _PAGE_TYPE, page)


_PAGE_TYPE = "text/html; charset=utf-8"


def _page(title: str, text: str, extra: str) -> bytes:
    return (
        f"<!DOCTYPE html>\r\n{extra}"
        f"<html><head><title>{title}</title></head>\r\n"
        f"<body><h1>{title}</h1><p>{text}</p></body></html>\r\n"
    ).encode()


# Writing, for the client


def build_request(
    method: str, target: str, *, host: str, content_type: str = "", body: bytes = b""
) -> bytes:
    """One whole request; ``host`` as the user wrote it.

    Raises `ValueError` if the host holds control characters: it would write headers.
    """
    if not host.isprintable():
        raise ValueError(f"{host!r} is not the name of a host")
    lines = [f"{method} {target} HTTP/1.1", "Connection: Keep-Alive", f"Host: {host}"]
    if target == "/":
        lines.append("X-VPN: 1")  # the original gives the mark only to whom sends this
    if content_type:
        lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode("utf-8") + b"\r\n\r\n" + body


# Reading heads


def _parse(raw: bytes) -> tuple[bytes, dict[str, str], bytes]:
    headers: dict[str, str] = {}
    first, at = _next_line(raw, 0)
    while True:
        line, at = _next_line(raw, at)
        if not line:
            return first, headers, raw[at:]
        name, value = _header(line)
        headers[name] = value


def _next_line(raw: bytes, at: int) -> tuple[bytes, int]:
    end = raw.find(b"\n", at)
    if end < 0:
        raise ProtocolError("message ends within its head")
    return raw[at:end].removesuffix(b"\r"), end + 1


def _announced(headers: dict[str, str]) -> int:
    value = headers.get("content-length", "0")
    if not _DIGITS.match(value):
        raise ProtocolError(f"{value[:40]!r} is not a length of a body")
    return int(value)


def _parse_response(raw: bytes) -> Response:
    first, headers, body = _parse(raw)
    return Response(_status_line(first), headers, body)


def _request_line(line: bytes) -> tuple[str, str]:
    _check_printable(line)
    words = line.split()
    if len(words) < 3:
        raise ProtocolError(f"request line {line[:40]!r} has fewer than three words")
    return words[0].decode("ascii"), words[1].decode("ascii")


def _status_line(line: bytes) -> int:
    _check_printable(line)
    words = line.split(None, 2)
    if len(words) < 3 or words[0] != b"HTTP/1.1" or not re.match(rb"[1-9][0-9]{2}\Z", words[1]):
        raise ProtocolError(f"{line[:40]!r} is not the status line of a response")
    return int(words[1])


def _check_printable(line: bytes) -> None:
    if not _PRINTABLE.match(line):
        raise ProtocolError(f"{line[:40]!r} is not the first line of a message")


def _header(line: bytes) -> tuple[str, str]:
    name, colon, value = line.partition(b":")
    if not colon or not _NAME.match(name):
        raise ProtocolError(f"{line[:40]!r} is not a header")
    return name.decode("ascii").lower(), value.strip().decode("latin-1")
