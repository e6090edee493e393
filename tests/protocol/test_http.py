"""HTTP: the requests of stock clients, the limits, and any cut of any stream."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvpn.protocol import http
from pkvpn.protocol.errors import ProtocolError
from pkvpn.protocol.http import Request, RequestCutter, Response, ResponseCutter

PROBE = (
    b"GET / HTTP/1.1\r\nX-VPN: 1\r\nHost: 10.98.0.1\r\nKeep-Alive: timeout=15; max=19\r\n"
    b"Connection: Keep-Alive\r\nAccept-Language: ja\r\n"
    b"User-Agent: Mozilla/5.0 (Windows NT 6.3; WOW64; rv:29.0) Gecko/20100101 Firefox/29.0\r\n"
    b"Pragma: no-cache\r\nCache-Control: no-cache\r\n\r\n"
)
SIGNATURE = (
    b"POST /vpnsvc/connect.cgi HTTP/1.1\r\nConnection: Keep-Alive\r\nContent-Length: 10\r\n"
    b"Content-Type: image/jpeg\r\nHost: 10.98.0.1\r\n\r\nVPNCONNECT"
)
PACK = (
    b"POST /vpnsvc/vpn.cgi HTTP/1.1\r\nConnection: Keep-Alive\r\nContent-Length: 4\r\n"
    b"Content-Type: application/octet-stream\r\nDate: Mon, 23 Nov 2026 04:30:36 GMT\r\n"
    b"Host: 10.98.0.1\r\nKeep-Alive: timeout=15; max=19\r\n\r\n\0\r\n\n"
)


def test_the_requests_of_a_stock_client() -> None:
    probe = http.parse_request(PROBE)
    assert (probe.method, probe.target, probe.body) == ("GET", "/", b"")
    assert probe.headers["x-vpn"] == "1"
    assert probe.headers["keep-alive"] == "timeout=15; max=19"
    signature = http.parse_request(SIGNATURE)
    assert (signature.method, signature.target) == ("POST", http.CONNECT_TARGET)
    assert http.is_signature(signature.body)
    assert http.parse_request(PACK).body == b"\0\r\n\n"


@pytest.mark.parametrize("tail", [b"", b"G", PACK[:-1]])
def test_whole_byte_by_byte_and_with_a_tail(tail: bytes) -> None:
    stream = PROBE + SIGNATURE + PACK + PROBE
    requests = [PROBE, SIGNATURE, PACK, PROBE]
    cutter = RequestCutter()
    assert cutter.feed(stream + tail) == requests
    assert cutter.rest() == tail
    cutter = RequestCutter()
    assert [r for byte in stream + tail for r in cutter.feed(bytes([byte]))] == requests
    assert cutter.rest() == tail
    assert cutter.feed(PACK) == [PACK]


def test_bare_line_ends_are_taken() -> None:
    raw = b"GET /x HTTP/1.1\nHost: h\n\n"
    assert RequestCutter().feed(raw) == [raw]
    assert http.parse_request(raw) == Request("GET", "/x", {"host": "h"})


def head(*lines: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} / HTTP/1.1", *lines, "", ""]).encode()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GET /\r\n", "fewer than three words"),
        (b"\r\n", "fewer than three words"),
        (b"GET / HTTP/1.1\r\nno colon\r\n", "not a header"),
        (b"GET / HTTP/1.1\r\n: empty\r\n", "not a header"),
        (b"GET / HTTP/1.1\r\nHost : h\r\n", "not a header"),
        (b"GET / HTTP/1.1\r\nHost: h\r\n folded: x\r\n", "not a header"),
        (b"\x16\x03\x01", "not the first line"),
        (b"GET /\xff HTTP", "not the first line"),
        (b"G" * 4097, "longer than 4096"),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 4100, "longer than 4096"),
        (head(*["X: y"] * 129), "more than 128 headers"),
        (head(*["X: " + "y" * 4000] * 5), "larger than 16384"),
        (head("Content-Length: 65537")[:-2], "65537 bytes, at most 65536"),
        (head("Content-Length: 99999999999"), "not a length"),
        (head("Content-Length: -1"), "not a length"),
        (head("Content-Length: +1"), "not a length"),
        (head("Content-Length: 1_0"), "not a length"),
        (head("Content-Length: "), "not a length"),
        (head("Content-Length: 1", "Content-Length: 2"), "two lengths"),
        (head("Transfer-Encoding: chunked")[:-2], "transfer encoding"),
    ],
)
def test_what_is_refused_as_soon_as_it_is_seen(data: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        RequestCutter().feed(data)
    cutter = RequestCutter()
    with pytest.raises(ProtocolError, match=why):
        [cutter.feed(bytes([byte])) for byte in data]


def test_who_answers_one_at_a_time_does_not_read_the_others() -> None:
    cutter = RequestCutter()
    assert cutter.first(PROBE[:9]) is None
    assert cutter.first(PROBE[9:] + b"\0 is no request\n" * 1000) == PROBE
    with pytest.raises(ProtocolError):
        cutter.first(b"")


def test_what_is_just_within_the_limits() -> None:
    line = b"GET /" + b"x" * (4096 - 14) + b" HTTP/1.1\r\n"
    assert len(line) == 4096 + 2
    raw = line + b"X: y\r\n" * 128 + b"\r\n"
    assert RequestCutter().feed(raw) == [raw]
    raw = head("Content-Length: 65536", "content-length: 65536") + bytes(65536)
    assert RequestCutter().feed(raw) == [raw]
    assert len(http.parse_request(raw).body) == 65536


def test_limits_are_arguments() -> None:
    with pytest.raises(ProtocolError, match="at most 9"):
        RequestCutter(max_body=9).feed(SIGNATURE)
    with pytest.raises(ProtocolError, match="larger than 100"):
        RequestCutter(max_head=100).feed(PROBE)


def test_a_request_that_was_not_cut_right_is_refused() -> None:
    for raw in (SIGNATURE[:-1], SIGNATURE + b"x", PROBE[:-2], b""):
        with pytest.raises(ProtocolError):
            http.parse_request(raw)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"VPNCONNECT", True),
        (b"VPNCONNECT ", False),
        (b"GIF89a" + bytes(1404), False),
        (b"GIF89a" + bytes(1405), True),
        (b"GIF89a" + bytes(3405), True),
        (b"GIF89a" + bytes(3406), False),
        (b"GIF87a" + bytes(1405), False),
        (b"", False),
    ],
)
def test_signature(body: bytes, *, expected: bool) -> None:
    assert http.is_signature(body) is expected


def read(raw: bytes) -> Response:
    cutter = ResponseCutter()
    cutter.feed(raw + b"tail")
    response = cutter.cut()
    assert response is not None
    assert cutter.rest() == b"tail"
    return response


def test_the_probe_page_has_the_mark_where_stock_clients_look() -> None:
    response = read(http.build_probe_page())
    assert http.PROBE_MARK.encode() in response.body[:1023]
    assert response.headers["content-length"] == str(len(response.body))


def test_a_pack_response() -> None:
    response = read(http.build_pack_response(b"pack"))
    assert response.is_pack
    assert response.body == b"pack"
    assert not read(http.build_probe_page()).is_pack


@pytest.mark.parametrize("status", [401, 403, 404, 501])
def test_an_error_page_lets_nobody_write_into_it(status: int) -> None:
    response = read(http.build_error_page(status, "<M>", "/<script>&" + "x" * 5000))
    assert response.status == status
    assert b"<script>" not in response.body
    assert b"<M>" not in response.body
    assert len(response.body) < 600
    if status in (403, 404):
        assert b"/(script)&amp;" in response.body


def test_a_request_of_ours_is_read_back() -> None:
    raw = http.build_request(
        "POST", http.VPN_TARGET, host="h", content_type=http.PACK_TYPE, body=b"x"
    )
    request = http.parse_request(raw)
    assert (request.method, request.target, request.body) == ("POST", http.VPN_TARGET, b"x")
    assert request.headers["content-type"] == http.PACK_TYPE
    probe = http.parse_request(http.build_request("GET", "/", host="h"))
    assert probe.headers["x-vpn"] == "1"
    with pytest.raises(ValueError, match="host"):
        http.build_request("GET", "/", host="h\r\nX: y")


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx",
        b"HTTP/1.1 200\r\nContent-Length: 1\r\n\r\nx",
        b"HTTP/1.1 2x0 OK\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1048576\r\n",
        b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
    ],
)
def test_a_response_that_the_client_refuses(raw: bytes) -> None:
    cutter = ResponseCutter()
    cutter.feed(raw)
    with pytest.raises(ProtocolError):
        cutter.cut()


def test_a_response_byte_by_byte() -> None:
    cutter = ResponseCutter()
    raw = http.build_pack_response(b"pack")
    for byte in raw[:-1]:
        cutter.feed(bytes([byte]))
        assert cutter.cut() is None
    cutter.feed(raw[-1:] + b"\xff\xff\xff\xff")
    response = cutter.cut()
    assert response is not None
    assert response.body == b"pack"
    assert cutter.rest() == b"\xff\xff\xff\xff"


pieces = st.one_of(
    st.binary(max_size=12),
    st.sampled_from([PROBE, SIGNATURE, PACK, b"\r\n", b"Content-Length: 3\r\n", b"GET / HTTP/1.1"]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(pieces, max_size=8))
def test_only_a_protocol_error_leaves_a_cutter(parts: list[bytes]) -> None:
    cutter = RequestCutter()
    try:
        for part in parts:
            for raw in cutter.feed(part):
                http.parse_request(raw)
    except ProtocolError:
        pass
    responses = ResponseCutter()
    try:
        for part in parts:
            responses.feed(part)
            responses.cut()
    except ProtocolError:
        pass


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([PROBE, SIGNATURE, PACK]), max_size=4),
    st.lists(st.integers(1, 90), min_size=1, max_size=10),
)
def test_no_cut_changes_what_is_read(requests: list[bytes], cuts: list[int]) -> None:
    stream, cutter, got, at, turn = b"".join(requests), RequestCutter(), [], 0, 0
    while at < len(stream):
        size = cuts[turn % len(cuts)]
        got += cutter.feed(stream[at : at + size])
        at, turn = at + size, turn + 1
    assert got == requests
