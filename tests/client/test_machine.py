"""The client's decisions: time is an argument, what is asserted is bytes and events."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvpn.client.machine import Comeback, Credentials, Event, Frames, Lost, Step, Stream
from pkvpn.protocol import blocks, http
from pkvpn.protocol.errors import ErrorCode, ProtocolError
from pkvpn.protocol.hashes import secure_password, user_key
from pkvpn.protocol.messages import (
    AdditionalConnect,
    AdditionalReply,
    AuthType,
    Direction,
    ErrorReply,
    Hello,
    Login,
    Noop,
    Welcome,
    read_client_message,
)
from pkvpn.protocol.pack import Pack

RANDOM = bytes(range(20))
WELCOME = Welcome("SID-U1-1", "CID-1", bytes(20), timeout=20.0)
FRAME = bytes(60)
CREDENTIALS = Credentials.with_password("T", "u1", "pw1")


def zeros(size: int) -> bytes:
    return bytes(size)


def ones(size: int) -> bytes:
    return b"\xff" * size


def stream(purpose: Credentials | Welcome = CREDENTIALS, *, probe: bool = False) -> Stream:
    return Stream(purpose, host="h", now=0.0, random=zeros, probe=probe)


def said(it: Stream) -> list[http.Request]:
    requests = [http.parse_request(raw) for raw in http.RequestCutter().feed(bytes(it.output))]
    it.output.clear()
    return requests


def reply(pack: Pack | Welcome) -> bytes:
    return http.build_pack_response(pack.encode())


def in_data(timeout: float = 20.0, at: float = 0.0) -> Stream:
    it = stream()
    welcome = Welcome("S", "C", bytes(20), timeout)
    it.receive(reply(Hello(RANDOM).to_pack()) + reply(welcome), at)
    it.output.clear()
    return it


def test_a_login_step_by_step() -> None:
    it = stream(probe=True)
    (probe,) = said(it)
    assert (probe.method, probe.target) == ("GET", "/")

    assert it.receive(http.build_probe_page(), 0.1) == []
    (signature,) = said(it)
    assert signature.target == http.CONNECT_TARGET
    assert http.is_signature(signature.body)

    assert it.receive(reply(Hello(RANDOM).to_pack()), 0.2) == []
    (request,) = said(it)
    login = read_client_message(Pack.decode(request.body))
    assert isinstance(login, Login)
    assert (login.hub, login.user, login.auth_type) == ("T", "u1", AuthType.PASSWORD)
    assert login.secure_password == secure_password(user_key("pw1", "u1"), RANDOM)
    assert (login.use_encrypt, login.use_compress, login.half_connection) == (True, False, False)

    assert it.receive(reply(WELCOME), 0.3) == [WELCOME]
    assert it.step is Step.DATA
    decoder = blocks.BlockDecoder()
    assert decoder.feed(bytes(it.output)) == []
    assert decoder.keep_alives == 1


def test_a_login_byte_by_byte_with_frames_behind_the_welcome() -> None:
    answers = (
        http.build_probe_page()
        + reply(Hello(RANDOM).to_pack())
        + reply(WELCOME)
        + blocks.encode_keep_alive(b"abc")
        + blocks.encode_batch([FRAME])
    )
    whole: list[Event] = stream(probe=True).receive(answers, 0.0)
    it = stream(probe=True)
    single = [event for byte in answers for event in it.receive(bytes([byte]), 0.0)]
    assert whole == single == [WELCOME, Frames([FRAME])]


def test_a_session_that_goes_on() -> None:
    it = stream(WELCOME)
    assert said(it)[0].target == http.CONNECT_TARGET
    it.receive(reply(Hello(RANDOM).to_pack()), 0.0)
    message = read_client_message(Pack.decode(said(it)[0].body))
    assert isinstance(message, AdditionalConnect)
    assert message.session_key == WELCOME.session_key
    assert it.receive(reply(AdditionalReply().to_pack()), 0.0) == [AdditionalReply()]
    assert it.step is Step.DATA


@pytest.mark.parametrize(
    ("credentials", "expected"),
    [
        (Credentials.anonymous("T", "u"), (AuthType.ANONYMOUS, "", b"", b"")),
        (Credentials.with_plain_password("T", "u", "p"), (AuthType.PLAIN_PASSWORD, "p", b"", b"")),
        (
            Credentials.with_certificate("T", "u", b"der", lambda random: b"s" + random),
            (AuthType.CERTIFICATE, "", b"der", b"s" + RANDOM),
        ),
    ],
)
def test_other_ways_to_log_in(
    credentials: Credentials, expected: tuple[AuthType, str, bytes, bytes]
) -> None:
    it = stream(credentials)
    said(it)
    it.receive(reply(Hello(RANDOM).to_pack()), 0.0)
    login = read_client_message(Pack.decode(said(it)[0].body))
    assert isinstance(login, Login)
    seen = (login.auth_type, login.plain_password, login.certificate, login.signature)
    assert seen == expected


def test_a_refusal_ends_the_stream() -> None:
    it = stream()
    it.receive(reply(Hello(RANDOM).to_pack()), 0.0)
    assert it.receive(reply(ErrorReply(9).to_pack()), 0.0) == [ErrorReply(9)]
    assert it.step is Step.ENDED
    assert it.next_deadline() is None
    assert it.expire(1000.0) == []
    assert it.receive(b"anything", 0.0) == []


def test_a_noop_is_answered_with_a_noop() -> None:
    it = stream()
    it.receive(reply(Hello(RANDOM).to_pack()), 0.0)
    said(it)
    assert it.receive(reply(Noop().to_pack()), 0.0) == []
    assert read_client_message(Pack.decode(said(it)[0].body)) == Noop()
    assert it.receive(reply(WELCOME), 0.0) == [WELCOME]


@pytest.mark.parametrize(
    "answers",
    [
        http.build_error_page(403, "GET", "/"),
        b"SSH-2.0-OpenSSH\r\n",
        http.build_probe_page() + http.build_error_page(403, "POST", "/"),
        http.build_probe_page() + http.build_pack_response(b"\xff"),
        http.build_probe_page() + reply(Pack()),
    ],
)
def test_what_is_no_vpn_server(answers: bytes) -> None:
    with pytest.raises(ProtocolError):
        stream(probe=True).receive(answers, 0.0)


@pytest.mark.parametrize(
    "welcome",
    [
        Welcome("S", "C", bytes(20), 20.0, use_encrypt=False),
        Welcome("S", "C", bytes(20), 20.0, use_compress=True),
        Welcome("S", "C", bytes(20), 20.0, half_connection=True),
        Welcome("S", "C", bytes(20), 0.0),
    ],
)
def test_a_welcome_that_cannot_be_followed(welcome: Welcome) -> None:
    it = stream()
    it.receive(reply(Hello(RANDOM).to_pack()), 0.0)
    with pytest.raises(ProtocolError, match="server wants"):
        it.receive(reply(welcome), 0.0)


def test_a_connection_one_way_only_cannot_be_followed() -> None:
    it = stream(WELCOME)
    it.receive(reply(Hello(RANDOM).to_pack()), 0.0)
    with pytest.raises(ProtocolError, match="TO_CLIENT"):
        it.receive(reply(AdditionalReply(Direction.TO_CLIENT).to_pack()), 0.0)


def test_each_answer_has_15_seconds() -> None:
    it = stream()
    assert it.next_deadline() == 15.0
    it.receive(reply(Hello(RANDOM).to_pack()), 10.0)
    assert it.next_deadline() == 25.0
    assert it.expire(24.9) == []
    assert it.expire(25.0) == [Lost("waited 15 s for the reply to the login")]


@pytest.mark.parametrize(("random", "after"), [(zeros, 4.0), (ones, 10.0)])
def test_keep_alives_come_between_a_fifth_and_half_of_the_time_out(
    random: object, after: float
) -> None:
    it = in_data()
    it._random = zeros if random is zeros else ones
    assert it.expire(9.9) == []  # the first, drawn with zeros, was due after a fifth
    it.output.clear()
    assert it.next_deadline() == pytest.approx(9.9 + after, abs=0.001)


def test_a_frame_postpones_the_keep_alive() -> None:
    it = in_data()
    assert it.next_deadline() == 4.0
    it.send([FRAME], 3.0)
    assert bytes(it.output) == blocks.encode_batch([FRAME])
    assert it.next_deadline() == 7.0
    it.expire(6.9)
    assert bytes(it.output) == blocks.encode_batch([FRAME])


def test_a_silent_peer_is_lost_after_the_time_out_and_half_a_block_is_silence() -> None:
    it = in_data()
    batch = blocks.encode_batch([FRAME])
    it.receive(batch, 5.0)
    it.receive(batch[:20], 10.0)
    assert it.expire(24.9) == []
    assert it.expire(25.0) == [Lost("waited 20 s for frames")]


def test_a_keep_alive_is_a_sign_of_life() -> None:
    it = in_data()
    it.receive(blocks.encode_keep_alive(b"abc"), 19.0)
    assert it.expire(38.9) == []
    assert it.expire(39.0) != []


ANSWERS = [
    http.build_probe_page(),
    reply(Hello(RANDOM).to_pack()),
    reply(WELCOME),
    reply(AdditionalReply().to_pack()),
    reply(ErrorReply(9).to_pack()),
    reply(Noop().to_pack()),
    blocks.encode_batch([FRAME]),
    blocks.encode_keep_alive(b"abc"),
]


@settings(max_examples=200, deadline=None)
@given(
    st.booleans(),
    st.sampled_from([CREDENTIALS, WELCOME]),
    st.lists(st.one_of(st.sampled_from(ANSWERS), st.binary(max_size=10)), max_size=6),
)
def test_only_a_protocol_error_leaves_a_stream(
    probe: bool, purpose: Credentials | Welcome, answers: list[bytes]
) -> None:
    it = stream(purpose, probe=probe)
    try:
        for now, answer in enumerate(answers):
            it.receive(answer, now)
            it.expire(now)
            deadline = it.next_deadline()
            assert (deadline is None) == (it.step is Step.ENDED)
            assert deadline is None or deadline > now
    except ProtocolError:
        pass


# Coming back


def comeback(session: Welcome | None = None) -> Comeback:
    it = Comeback(ones, now=0.0)
    assert it.next_deadline() == 0.0
    it.dial(0.0)
    if session is not None:
        it.welcomed(session, 0.0)
    return it


def test_a_live_session_is_resumed_at_once_and_then_each_second() -> None:
    it = comeback(WELCOME)
    assert it.next_deadline() is None
    it.heard(10.0)
    it.lost(10.5)
    assert it.next_deadline() == 10.5
    assert it.dial(10.5) is WELCOME
    it.lost(10.6)
    assert it.next_deadline() == 11.5
    assert it.dial(11.5) is WELCOME


def test_a_session_ends_when_nothing_was_heard_for_its_time_out() -> None:
    it = comeback(WELCOME)
    it.heard(10.0)
    now = 10.0
    it.lost(now)
    dialled = []
    while it.session is not None:
        deadline = it.next_deadline()
        assert deadline is not None
        now = deadline
        assert it.dial(now) is WELCOME
        dialled.append(now)
        it.lost(now + 0.001)
    assert len(dialled) == 20
    assert dialled[-1] < 30.0
    assert it.dial(100.0) is None


@pytest.mark.parametrize("code", [ErrorCode.SESSION_TIMEOUT, ErrorCode.INVALID_PROTOCOL])
def test_the_server_says_that_the_session_has_ended(code: ErrorCode) -> None:
    it = comeback(WELCOME)
    it.lost(1.0)
    it.dial(1.0)
    it.refused(code, 1.1)
    assert it.session is None
    assert it.next_deadline() == pytest.approx(2.1, abs=0.001)


def test_another_refusal_of_a_resumption_is_tried_again() -> None:
    it = comeback(WELCOME)
    it.lost(1.0)
    it.dial(1.0)
    it.refused(ErrorCode.TOO_MANY_CONNECTIONS, 1.1)
    assert it.session is WELCOME
    assert it.next_deadline() == 2.0


def test_full_logins_back_off_up_to_a_cap_and_start_anew_after_a_welcome() -> None:
    it = comeback()
    pauses = []
    for _ in range(40):
        it.refused(ErrorCode.AUTH_FAILED, 0.0)
        deadline = it.next_deadline()
        assert deadline is not None
        pauses.append(round(deadline))
    assert pauses[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert pauses[-1] == 60
    it.welcomed(WELCOME, 0.0)
    it.end_session(0.0)
    assert it.next_deadline() == pytest.approx(1.0, abs=0.001)


def test_the_backoff_is_spread_over_half_of_it() -> None:
    it = Comeback(zeros, now=0.0)
    it.dial(0.0)
    it.lost(0.0)
    assert it.next_deadline() == 0.5
