"""The messages of the login: vectors that the real programs took, and what strangers send."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvpn.protocol import messages
from pkvpn.protocol.errors import ErrorCode, ProtocolError, meaning
from pkvpn.protocol.messages import (
    AdditionalConnect,
    AdditionalReply,
    AuthType,
    Direction,
    ErrorReply,
    Hello,
    Login,
    Node,
    Noop,
    Welcome,
)
from pkvpn.protocol.pack import Element, Kind, Pack, Value

DATA = Path(__file__).parent.parent / "data" / "protocol"
RANDOM = bytes(range(20))
KEY = bytes(range(0x40, 0x54))

HELLO = bytes.fromhex(
    "00000004 00000006 68656c6c6f 00000002 00000001 00000009 4d7920536572766572"
    "00000008 76657273696f6e 00000000 00000001 000001f5"
    "00000006 6275696c64 00000000 00000001 000025ca"
    "00000007 72616e646f6d 00000001 00000001 00000014"
    "000102030405060708090a0b0c0d0e0f10111213"
)
LOGIN = bytes.fromhex(
    "00000005 00000007 6d6574686f64 00000002 00000001 00000005 6c6f67696e"
    "00000008 6875626e616d65 00000002 00000001 00000001 54"
    "00000009 757365726e616d65 00000002 00000001 00000002 7531"
    "00000009 6175746874797065 00000000 00000001 00000001"
    "00000010 7365637572655f70617373776f7264 00000001 00000001 00000014"
    "1e9d2e20b76071f3d4b08ea984c3cb710723825f"
)
WELCOME = bytes.fromhex(
    "00000009 0000000d 73657373696f6e5f6e616d65 00000002 00000001 00000008 5349442d55312d31"
    "00000010 636f6e6e656374696f6e5f6e616d65 00000002 00000001 00000005 4349442d31"
    "0000000f 6d61785f636f6e6e656374696f6e 00000000 00000001 00000001"
    "0000000c 7573655f656e6372797074 00000000 00000001 00000001"
    "0000000d 7573655f636f6d7072657373 00000000 00000001 00000000"
    "00000010 68616c665f636f6e6e656374696f6e 00000000 00000001 00000000"
    "00000008 74696d656f7574 00000000 00000001 00004e20"
    "0000000c 73657373696f6e5f6b6579 00000001 00000001 00000014"
    "404142434445464748494a4b4c4d4e4f50515253"
    "0000000f 73657373696f6e5f6b65795f3332 00000000 00000001 00000001"
)
ADDITIONAL = bytes.fromhex(
    "00000002 00000007 6d6574686f64 00000002 00000001 00000012 6164646974696f6e616c5f636f6e6e656374"
    "0000000c 73657373696f6e5f6b6579 00000001 00000001 00000014"
    "404142434445464748494a4b4c4d4e4f50515253"
)
ADDITIONAL_REPLY = bytes.fromhex(
    "00000002 00000006 6572726f72 00000000 00000001 00000000"
    "0000000a 646972656374696f6e 00000000 00000001 00000000"
)


def again(pack: Pack) -> Pack:
    return Pack.decode(pack.encode())


def test_hello_vector() -> None:
    hello = Hello(RANDOM, product="My Server")
    assert len(HELLO) == 120
    assert hello.to_pack().encode() == HELLO
    assert Hello.from_pack(Pack.decode(HELLO)) == hello


def test_login_vector_of_five_elements() -> None:
    assert len(LOGIN) == 156
    login = messages.read_client_message(Pack.decode(LOGIN))
    assert isinstance(login, Login)
    assert (login.hub, login.user, login.auth_type) == ("T", "u1", AuthType.PASSWORD)
    assert login.secure_password.hex() == "1e9d2e20b76071f3d4b08ea984c3cb710723825f"
    # What is missing counts as 0, and as one connection.
    assert (login.use_encrypt, login.qos, login.max_connection) == (False, False, 1)


def test_smallest_welcome_vector() -> None:
    assert len(WELCOME) == 292
    welcome = Welcome.from_pack(Pack.decode(WELCOME))
    assert welcome == Welcome("SID-U1-1", "CID-1", KEY, 20.0, policy={})
    pack = Pack.decode(welcome.encode())
    for name in Pack.decode(WELCOME):
        if name != "session_key_32":
            assert pack._elements[name] == Pack.decode(WELCOME)._elements[name]


def test_additional_vectors() -> None:
    assert len(ADDITIONAL) == 91
    message = messages.read_client_message(Pack.decode(ADDITIONAL))
    assert message == AdditionalConnect(KEY, client_version=0, client_build=0)
    assert AdditionalReply().to_pack().encode() == ADDITIONAL_REPLY
    assert AdditionalReply.from_pack(Pack.decode(ADDITIONAL_REPLY)) == AdditionalReply()


@pytest.mark.parametrize(
    "login",
    [
        Login("T", "u1", AuthType.ANONYMOUS),
        Login("T", "u1", AuthType.PASSWORD, secure_password=KEY, qos=True, half_connection=True),
        Login("T", "ü", AuthType.PLAIN_PASSWORD, plain_password="pässword", use_encrypt=False),
        Login("T", "u1", AuthType.CERTIFICATE, certificate=b"der", signature=b"sig"),
        Login(
            "T",
            "u1",
            AuthType.ANONYMOUS,
            max_connection=8,
            use_compress=True,
            bridge_mode=True,
            monitor_mode=True,
            machine_id=KEY,
            client_id=KEY[:16],
            client="c",
            client_version=1,
            client_build=2,
            node=Node("p", 3, 9674, "host", "Linux", "6", IPv4Address("10.0.0.1"), 443),
        ),
    ],
)
def test_login_round_trip(login: Login) -> None:
    assert messages.read_client_message(again(login.to_pack())) == login


def test_integers_of_the_node_travel_with_their_bytes_swapped() -> None:
    pack = Login("T", "u", 0, node=Node(product_build=9674)).to_pack()
    assert pack.get_int("ClientProductBuild") == 0xCA250000


@pytest.mark.parametrize("direction", list(Direction))
def test_additional_round_trip(direction: Direction) -> None:
    reply = AdditionalReply(direction)
    assert AdditionalReply.from_pack(again(reply.to_pack())) == reply
    connect = AdditionalConnect(KEY, "c", 1, 2)
    assert messages.read_client_message(again(connect.to_pack())) == connect


def test_welcome_round_trip() -> None:
    welcome = Welcome("S", "C", KEY, 60.0, 8, False, True, True, True, "Grüße")
    pack = Pack.decode(welcome.encode())
    assert Welcome.from_pack(pack) == welcome
    assert pack.get_int("timeout") == 60000
    assert pack.get_int("policy:Access") == 1
    assert pack.get_int("policy:MaxConnection") == 32
    # Either would harm the user: the first erases the password, the second ends the client.
    assert pack.get_int("policy:NoSavePassword") == pack.get_int("policy:AutoDisconnect") == 0


def test_refusals() -> None:
    pack = again(ErrorReply(ErrorCode.AUTH_FAILED).to_pack())
    assert pack.get_int("error", 0) == 9
    assert "no_save_password" in pack
    assert ErrorReply.find(pack) == ErrorReply(9)
    assert ErrorReply.find(Pack.decode(WELCOME)) is None
    assert ErrorReply.find(Pack.decode(ADDITIONAL_REPLY)) is None
    assert meaning(9) == "authentication failed"
    assert meaning(777) == "error 777"
    assert all(meaning(code) for code in ErrorCode)


def test_noop_and_admin() -> None:
    assert messages.read_client_message(again(Noop().to_pack())) == Noop()
    pack = Pack()
    pack.put_str("method", "admin")
    pack.put_data("secure_password", KEY)
    assert messages.read_client_message(pack) == messages.Admin(KEY)


def recorded(name: str) -> Pack:
    raw = bytes.fromhex((DATA / f"{name}.hex").read_text())
    assert Pack.decode(raw).encode() == raw
    return Pack.decode(raw)


def test_what_the_real_server_sends() -> None:
    hello = Hello.from_pack(recorded("hello"))
    assert (hello.version, hello.build) == (messages.VERSION, messages.BUILD)
    assert hello.product.startswith("SoftEther VPN Server")
    welcome = Welcome.from_pack(recorded("welcome"))
    assert (welcome.session_name, welcome.timeout) == ("SID-U1-5", 20.0)
    assert (welcome.use_encrypt, welcome.half_connection) == (True, False)
    assert set(welcome.policy) == set(messages.POLICY)
    assert dict(welcome.policy) == dict(messages.POLICY)
    reply = recorded("additional-reply")
    assert AdditionalReply.from_pack(reply) == AdditionalReply(Direction.BOTH)
    assert ErrorReply.find(reply) is None
    assert ErrorReply.find(recorded("refusal")) == ErrorReply(ErrorCode.AUTH_FAILED)


def test_what_the_stock_client_sends() -> None:
    login = messages.read_client_message(recorded("stock-login"))
    assert isinstance(login, Login)
    assert (login.hub, login.user, login.auth_type) == ("T", "u1", AuthType.PASSWORD)
    assert len(login.secure_password) == 20
    assert (login.use_encrypt, login.use_compress, login.half_connection) == (True, False, False)
    assert (login.qos, login.max_connection) == (True, 1)
    assert login.machine_id == RANDOM
    assert login.client_id == RANDOM[:16]
    assert login.client == "SoftEther VPN Client Developer Edition"
    assert login.node == Node(
        product="SoftEther VPN Client Developer Edition",
        product_version=501,
        product_build=9674,
        hostname="client",
        os="Debian GNU/Linux",
        os_version="12 (bookworm)",
        address=IPv4Address("10.99.0.11"),
        port=58710,
    )
    more = messages.read_client_message(recorded("stock-additional-connect"))
    assert more == AdditionalConnect(KEY, login.client)


def without(raw: bytes, name: str) -> Pack:
    return Pack(e for e in Pack.decode(raw).elements() if e.name != name)


def changed(raw: bytes, element: Element) -> Pack:
    return Pack([*without(raw, element.name).elements(), element])


@pytest.mark.parametrize(
    "pack",
    [
        Pack(),
        changed(LOGIN, Element("method", Kind.STR, ("other",))),
        without(LOGIN, "hubname"),
        without(LOGIN, "username"),
        changed(LOGIN, Element("username", Kind.STR, ("u" * 256,))),
        changed(LOGIN, Element("plain_password", Kind.STR, ("p" * 256,))),
        changed(LOGIN, Element("secure_password", Kind.DATA, (bytes(21),))),
        changed(LOGIN, Element("cert", Kind.DATA, (bytes(16385),))),
        without(ADDITIONAL, "session_key"),
        changed(ADDITIONAL, Element("session_key", Kind.DATA, (bytes(19),))),
    ],
)
def test_what_makes_no_sense_is_a_protocol_error_with_code_4(pack: Pack) -> None:
    with pytest.raises(ProtocolError) as caught:
        messages.read_client_message(pack)
    assert caught.value.code == ErrorCode.PROTOCOL_ERROR


def test_too_long_a_name_of_a_machine_is_cut() -> None:
    node = Node(hostname="h" * 300, os="ü" * 300)
    login = Login("T", "u", 0, client="c" * 300, node=node)
    read = Login.from_pack(again(login.to_pack()))
    assert (read.node.hostname, read.node.os, read.client) == ("h" * 255, "ü" * 255, "c" * 255)


@pytest.mark.parametrize("name", ["session_name", "connection_name", "session_key"])
def test_a_welcome_needs_what_a_stock_client_needs(name: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        Welcome.from_pack(without(WELCOME, name))
    assert caught.value.code == ErrorCode.PROTOCOL_ERROR


def test_other_broken_replies() -> None:
    with pytest.raises(ProtocolError):
        Hello.from_pack(without(HELLO, "random"))
    with pytest.raises(ProtocolError, match="direction 3"):
        AdditionalReply.from_pack(changed(ADDITIONAL_REPLY, Element("direction", Kind.INT, (3,))))


def test_secrets_do_not_show_in_a_repr() -> None:
    secret = b"\x17" * 20
    for message in (
        Login("T", "u", 1, secure_password=secret, plain_password="hush"),
        AdditionalConnect(secret),
        Welcome("S", "C", secret, 1.0),
    ):
        assert "x17" not in repr(message)
        assert "hush" not in repr(message)


KNOWN = [
    e for raw in (LOGIN, WELCOME, ADDITIONAL, HELLO) for e in Pack.decode(raw).elements()
] + list(Login("T", "u", 3, node=Node(address=IPv4Address("1.2.3.4"))).to_pack().elements())
values: dict[Kind, st.SearchStrategy[Value]] = {
    Kind.INT: st.sampled_from([0, 1, 0xFFFFFFFF]),
    Kind.DATA: st.binary(max_size=30),
    Kind.STR: st.sampled_from(["", "login", "additional_connect", "admin", "x" * 300]),
}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(KNOWN), unique_by=lambda e: e.name.lower()), st.data())
def test_only_a_protocol_error_leaves_a_reader(
    elements: list[Element], data: st.DataObject
) -> None:
    pack = Pack(
        e._replace(values=(data.draw(values[e.kind]),)) if data.draw(st.booleans()) else e
        for e in elements
    )
    for read in (
        messages.read_client_message,
        Hello.from_pack,
        Welcome.from_pack,
        AdditionalReply.from_pack,
        ErrorReply.find,
    ):
        try:
            read(pack)
        except ProtocolError:
            pass
