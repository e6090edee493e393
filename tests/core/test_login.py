import datetime as dt

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from pkvpn.core.accounts import Accounts, HubGone, HubRecord, Kicked, UserRecord
from pkvpn.core.attempts import Attempts
from pkvpn.core.blob import Blob, Stage
from pkvpn.core.certificates import CertificateError, has_signed, read_certificate
from pkvpn.core.login import (
    CANARY_HUB,
    CANARY_HUB_ID,
    MAX_REQUESTS,
    LoginDesk,
    Outcome,
    address_key,
)
from pkvpn.core.session import SessionKeys, Sessions
from pkvpn.core.settings import CoreSettings
from pkvpn.protocol.hashes import user_key
from pkvpn.protocol.http import PROBE_MARK, VPN_TARGET
from pkvpn.protocol.messages import AuthType, Direction, Login, Noop, Welcome
from pkvpn.protocol.pack import Pack
from tests.core.desk import (
    LOGIN_OF_THE_SPEC,
    PROBE,
    RANDOM,
    SIGNATURE,
    additional,
    get,
    login,
    pack_of,
    pack_request,
    post,
    read,
)

CANARY = "c0ffee" * 10
KEYS = SessionKeys(bytes(32))
RANDOMNESS = RANDOM + b"\x12\x34"


def make_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def certificate_of(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "u3")])
    day = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, day, day.replace(year=2021))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


KEY = make_key()


class Desk:
    """A login desk with hub T, users u1 (pw1), anon and u3 (certificate), and one connection."""

    def __init__(self, started_at: float = 0.0, **settings: float) -> None:
        self.accounts = Accounts()
        self.accounts.apply(HubRecord(1, "T", True, 0, 0))
        self.accounts.apply(UserRecord(1, 1, "u1", "password", user_key("pw1", "u1"), b"", 11))
        self.accounts.apply(UserRecord(2, 1, "anon", "anonymous", b"", b"", 12))
        self.accounts.apply(UserRecord(3, 1, "u3", "certificate", b"", certificate_of(KEY), 13))
        self.sessions = Sessions(KEYS, timeout=60.0, started_at=started_at)
        options = CoreSettings("", **settings)  # type: ignore[arg-type]
        self.desk = LoginDesk(self.accounts, self.sessions, KEYS, options, CANARY)
        self.desk.loading = False
        self.blob = Blob()
        self.next_conn = 1

    def ask(self, raw: bytes, address: str = "192.0.2.1", now: float = 0.0) -> Outcome:
        return self.desk.answer(self.blob, address, raw, now, RANDOMNESS)

    def greeted(self) -> "Desk":
        self.blob = Blob()
        pack = pack_of(self.ask(SIGNATURE).reply)
        assert pack.get_data("random") == RANDOM
        return self

    def try_login(self, raw: bytes, now: float = 0.0, address: str = "192.0.2.1") -> Outcome:
        self.greeted()
        outcome = self.ask(raw, address, now)
        if outcome.session is not None:
            self.sessions.attach(outcome.session, self.next_conn, self.blob.direction)
            self.next_conn += 1
        return outcome

    def error(self, raw: bytes, now: float = 0.0, address: str = "192.0.2.1") -> int:
        outcome = self.try_login(raw, now, address)
        return pack_of(outcome.reply).get_int("error")


def welcome_of(outcome: Outcome) -> Welcome:
    return Welcome.from_pack(pack_of(outcome.reply))


# --- what is said to whom


def test_a_stock_client_finds_the_mark_and_a_browser_does_not() -> None:
    desk = Desk()
    probe = read(desk.ask(PROBE).reply)
    assert probe.status == 200
    assert PROBE_MARK.encode() in probe.body[:1023]
    page = read(desk.ask(get("/")).reply)
    assert (page.status, PROBE_MARK.encode() in page.body) == (403, False)
    assert desk.blob.stage is Stage.FRESH


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (get("/foo<b>"), 404),
        (get("/").replace(b"GET", b"HEAD"), 403),
        (get("/").replace(b"GET", b"BREW"), 501),
        (get("/api/"), 401),
        (post("/admin/x", b""), 401),
        (post("/vpnsvc/connect.cgi", b"VPNCONNECt"), 403),
        (post("/vpnsvc/connect.cgi", b""), 403),
        (post("/vpnsvc/vpn.cgi", b"x"), 404),
        (post("/", b"x"), 404),
    ],
)
def test_others_get_a_page(raw: bytes, status: int) -> None:
    outcome = Desk().ask(raw)
    assert (read(outcome.reply).status, outcome.close) == (status, "")


def test_options_gets_nothing_and_what_is_no_request_is_closed() -> None:
    desk = Desk()
    assert desk.ask(get("/").replace(b"GET", b"OPTIONS")) == Outcome()
    assert desk.ask(b"x\r\n\r\n").close != ""


def test_a_browser_may_ask_nineteen_times() -> None:
    desk = Desk()
    for _ in range(MAX_REQUESTS):
        assert desk.ask(get("/")).close == ""
    assert desk.ask(SIGNATURE).close != ""


def test_the_hello_is_the_one_of_the_specification() -> None:
    desk = Desk(server_name="My Server")  # type: ignore[arg-type]
    assert read(desk.ask(SIGNATURE).reply).body == bytes.fromhex(
        "00000004 00000006 68656c6c6f 00000002 00000001 00000009 4d7920536572766572"
        "00000008 76657273696f6e 00000000 00000001 000001f5"
        "00000006 6275696c64 00000000 00000001 000025ca"
        "00000007 72616e646f6d 00000001 00000001 00000014"
        "000102030405060708090a0b0c0d0e0f10111213"
    )
    gif = b"GIF89a" + bytes(1411 - 6 + 300)
    desk.blob = Blob()
    assert pack_of(desk.ask(post("/vpnsvc/connect.cgi", gif)).reply).get_int("build") == 9674


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (get("/"), 3),
        (post(VPN_TARGET, b"no pack"), 3),
        (post(VPN_TARGET, b""), 3),
        (post(VPN_TARGET, Noop().to_pack().encode(), "text/plain"), 3),
        (post("/vpnsvc/connect.cgi", b"VPNCONNECT"), 3),
        (pack_request(Pack()), 4),
        (login(user=""), 4),
        (login(hub=""), 4),
        (pack_request(Login("T", "u1", 9).to_pack()), 7),
        (login(monitor_mode=True), 107),
    ],
)
def test_what_makes_no_sense_behind_the_hello_is_refused(raw: bytes, code: int) -> None:
    assert Desk().error(raw) == code


def test_a_noop_is_answered_and_the_login_goes_on() -> None:
    desk = Desk().greeted()
    pack = pack_of(desk.ask(pack_request(Noop().to_pack())).reply)
    assert (pack.get_int("error"), pack.get_int("noop")) == (0, 1)
    assert desk.ask(login()).session is not None


def test_the_third_refusal_ends_the_connection() -> None:
    desk = Desk().greeted()
    closes = [desk.ask(login(password="no")).close for _ in range(3)]
    assert closes[:2] == ["", ""]
    assert closes[2] != ""


# --- logins


def test_the_login_of_the_specification_is_welcome() -> None:
    desk = Desk()
    outcome = desk.try_login(LOGIN_OF_THE_SPEC)
    welcome = welcome_of(outcome)
    assert (welcome.session_name, welcome.connection_name) == ("SID-U1-1", "CID-1")
    assert (welcome.timeout, welcome.max_connection) == (60.0, 1)
    assert (welcome.use_encrypt, welcome.use_compress, welcome.qos) == (True, False, False)
    assert "use_udp_acceleration" not in pack_of(outcome.reply)
    assert desk.blob.stage is Stage.IN_SESSION
    assert KEYS.read(welcome.session_key) is not None


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (login(), 0),
        (login(plain=True), 0),
        (login(user="U1", hub="t"), 0),
        (login(user="U1", plain=True), 0),
        (login(user="anon", password="whatever"), 0),
        (pack_request(Login("T", "anon", AuthType.ANONYMOUS).to_pack()), 0),
        (pack_request(Login("T", "u1", AuthType.ANONYMOUS).to_pack()), 9),
        (login(password="pw2"), 9),
        (login(password="pw2", plain=True), 9),
        (login(password="", plain=True), 9),
        (login(user="u9"), 9),
        (login(user="u3"), 9),
        (login(hub="X"), 8),
        (login(hub=CANARY_HUB), 8),
        (login(random=bytes(20)), 9),
    ],
)
def test_who_is_let_in(raw: bytes, code: int) -> None:
    desk = Desk()
    assert desk.error(raw) == code
    assert (len(desk.sessions) == 1) == (code == 0)


def test_a_user_without_a_password_is_not_opened_by_the_hash_of_nothing() -> None:
    zeros = Login("T", "u3", AuthType.PASSWORD, secure_password=bytes(20))
    desk = Desk()
    assert desk.error(pack_request(zeros.to_pack())) == 9
    desk.accounts.apply(UserRecord(4, 1, "u4", "certificate", b"", certificate_of(KEY), 14))
    assert desk.error(login(user="u4", password="")) == 9


def test_a_certificate_opens_with_its_key_only() -> None:
    other = make_key()
    der = certificate_of(KEY)

    def attempt(signer: rsa.RSAPrivateKey, text: bytes, certificate: bytes, user: str) -> int:
        signature = signer.sign(text, padding.PKCS1v15(), hashes.SHA1())
        message = Login(
            "T", user, AuthType.CERTIFICATE, certificate=certificate, signature=signature
        )
        return Desk().error(pack_request(message.to_pack()))

    assert attempt(KEY, RANDOM, der, "u3") == 0
    assert attempt(KEY, bytes(20), der, "u3") == 9
    assert attempt(other, RANDOM, der, "u3") == 9
    assert attempt(KEY, RANDOM, certificate_of(other), "u3") == 9
    assert attempt(other, RANDOM, certificate_of(other), "u3") == 9
    assert attempt(KEY, RANDOM, der, "u1") == 9
    assert attempt(KEY, RANDOM, der, "nobody") == 9
    assert not has_signed(b"", b"", RANDOM)


def test_only_rsa_certificates_are_for_users() -> None:
    der = certificate_of(KEY)
    pem = x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
    assert read_certificate(pem) == read_certificate(der) == der
    with pytest.raises(CertificateError, match="RSA keys only"):
        read_certificate(certificate_of(ec.generate_private_key(ec.SECP256R1())))
    with pytest.raises(CertificateError, match=r"no X\.509 certificate"):
        read_certificate(b"-----BEGIN nothing")


def test_an_offline_or_full_hub_says_so_to_its_users_only() -> None:
    desk = Desk()
    desk.accounts.apply(HubRecord(1, "T", False, 0, 0))
    assert (desk.error(login()), desk.error(login(password="no"))) == (10, 9)
    desk.accounts.apply(HubRecord(1, "T", True, 1, 0))
    assert [desk.error(login()) for _ in range(2)] == [0, 105]
    desk.accounts.apply(HubGone(1))
    assert desk.error(login()) == 8


def test_a_client_that_lost_its_session_replaces_it() -> None:
    desk = Desk()
    desk.accounts.apply(HubRecord(1, "T", True, 1, 0))
    mine = login(client_id=b"i" * 16)
    first = desk.try_login(mine).session
    assert first is not None
    assert desk.error(mine) == 105
    desk.sessions.detach(1, 0.0)
    assert desk.error(login(client_id=b"j" * 16)) == 105
    assert desk.try_login(mine).replaces is first


def test_the_server_decides_what_the_session_is_like() -> None:
    desk = Desk(max_connections=4)
    welcome = welcome_of(desk.try_login(login(max_connection=8, half_connection=True)))
    assert (welcome.max_connection, welcome.half_connection) == (4, True)
    assert desk.blob.direction is Direction.TO_SERVER
    welcome = welcome_of(desk.try_login(login(max_connection=1, half_connection=True)))
    assert (welcome.max_connection, welcome.half_connection) == (1, False)


def test_the_canary_has_a_hub_of_its_own() -> None:
    desk = Desk()
    outcome = desk.try_login(login("canary", CANARY, CANARY_HUB))
    assert outcome.session is not None
    assert outcome.session.hub_id == CANARY_HUB_ID
    assert desk.error(login("canary", "guess", CANARY_HUB)) == 8
    assert desk.error(login("canary", CANARY, "T")) == 9


# --- limits


def test_an_address_that_fails_too_often_is_not_heard_for_a_while() -> None:
    desk = Desk(address_failures=3, address_failure_interval=10.0)
    wrong = login(user="nobody")
    assert [desk.error(wrong) for _ in range(4)] == [9, 9, 9, 105]
    assert desk.error(login()) == 105
    assert desk.error(login(), address="192.0.2.2") == 0
    assert desk.error(login("canary", CANARY, CANARY_HUB)) == 0
    assert desk.error(login(), now=10.0) == 0


def test_a_user_whose_password_is_guessed_from_everywhere_is_protected() -> None:
    desk = Desk(user_failures=3, user_failure_interval=10.0)
    codes = [desk.error(login(password="no"), address=f"192.0.2.{i}") for i in range(5)]
    assert codes == [9, 9, 9, 105, 105]
    assert desk.error(login(), now=10.0) == 0


def test_who_guesses_from_everywhere_does_not_keep_a_user_out_of_its_own_place() -> None:
    desk = Desk(user_failures=3, user_failure_interval=10.0, address_failures=3)
    assert desk.error(login("U1"), address="198.51.100.7") == 0
    for i in range(5):
        desk.try_login(login(password="no"), address=f"192.0.2.{i}")
    assert desk.error(login(), address="192.0.2.200") == 105
    assert desk.error(login(), address="198.51.100.7") == 0
    # There it may be wrong as often as any address may.
    wrong = [desk.error(login(password="no"), address="198.51.100.7") for _ in range(4)]
    assert wrong == [9, 9, 9, 105]


def test_a_good_password_is_never_too_often() -> None:
    desk = Desk(address_failures=3)
    assert [desk.error(login()) for _ in range(10)] == [0] * 10


def test_attempts_are_forgiven() -> None:
    attempts = Attempts(failures=2, interval=1.0)
    for _ in range(2):
        assert attempts.allows("c", 0.0)
        attempts.failed("c", 0.0)
    assert not attempts.allows("c", 0.5)
    assert attempts.allows("c", 1.0)


def test_names_that_are_made_up_do_not_wipe_out_whose_password_is_guessed() -> None:
    attempts = Attempts(failures=3, interval=1000.0, limit=64)
    for _ in range(3):
        attempts.failed("victim", 0.0)
    for number in range(10_000):
        attempts.failed(f"nobody {number}", number / 1000)
        assert number % 100 or not attempts.allows("victim", 10.0)
    assert len(attempts._empty_at) <= 64
    # The latest of those who failed once is still counted.
    attempts.failed("nobody 9999", 10.0)
    attempts.failed("nobody 9999", 10.0)
    assert not attempts.allows("nobody 9999", 10.0)


@pytest.mark.parametrize(
    ("peer", "key"),
    [
        ("192.0.2.1:50000", "192.0.2.1"),
        ("[2001:db8:1:2:3:4:5:6]:443", "2001:db8:1:2::/64"),
        ("[::ffff:192.0.2.1]:443", "192.0.2.1"),
        ("[fe80::1%eth0]:443", "fe80::/64"),
        ("2001:db8:1:2:3:4:5:6:443", "2001:db8:1:2::/64"),
        ("strange", ""),
    ],
)
def test_addresses_are_counted_by_who_has_them(peer: str, key: str) -> None:
    assert address_key(peer) == key


# --- more connections


def with_session(**fields: object) -> tuple[Desk, bytes]:
    desk = Desk()
    return desk, welcome_of(desk.try_login(login(**fields))).session_key  # type: ignore[arg-type]


def test_a_session_takes_as_many_connections_as_it_was_given() -> None:
    desk, key = with_session(max_connection=3, half_connection=True)
    directions = []
    for _ in range(2):
        outcome = desk.try_login(additional(key))
        directions.append(pack_of(outcome.reply).get_int("direction"))
    assert directions == [1, 1]
    assert desk.error(additional(key)) == 15


def test_a_client_with_one_connection_that_makes_another_has_lost_the_first() -> None:
    desk, key = with_session()
    outcome = desk.try_login(additional(key))
    assert (pack_of(outcome.reply).get_int("error"), outcome.displaces) == (0, (1,))


def test_two_connections_where_one_is_allowed_are_both_displaced() -> None:
    desk, key = with_session()
    session = desk.sessions.of_connection(1)
    assert session is not None
    desk.sessions.attach(session, 99, Direction.BOTH)  # a core died between telling two edges
    assert desk.try_login(additional(key)).displaces == (1, 99)


def test_a_key_that_is_worth_nothing_ends_the_session_at_the_client() -> None:
    desk, key = with_session()
    assert desk.error(additional(bytes(20))) == 13
    assert desk.error(additional(SessionKeys(b"x" * 32).make(KEYS.read(key)))) == 13  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["kicked", "password", "offline", "gone"])
def test_what_an_operator_ended_stays_ended_in_every_later_core(how: str) -> None:
    _, key = with_session()
    later = Desk()
    later.desk.loading = True
    claim = KEYS.read(key)
    assert claim is not None
    if how == "kicked":
        later.accounts.apply(Kicked(claim.generation, claim.session))
    elif how == "password":
        later.accounts.apply(UserRecord(1, 1, "u1", "password", bytes(20), b"", 99))
    elif how == "offline":
        later.accounts.apply(HubRecord(1, "T", False, 0, 0))
    else:
        later.accounts.apply(HubGone(1))
    assert later.error(additional(key)) == 13
    blob = Blob(Stage.IN_SESSION, key=key)
    assert later.desk.restore(blob, 0.0) is None


def test_a_later_core_goes_on_with_a_session_it_knows_by_key_only() -> None:
    _, key = with_session(max_connection=2)
    later = Desk(started_at=100.0)
    outcome = later.try_login(additional(key), now=130.0)
    assert outcome.session is not None
    assert (outcome.session.name, outcome.session.key) == ("SID-U1-1", key)
    assert welcome_of(later.try_login(login(), now=131.0)).session_name == "SID-U1-2"


def test_what_may_still_be_replayed_is_asked_to_try_again() -> None:
    _, key = with_session()
    later = Desk(started_at=0.0)
    later.desk.loading = True
    assert later.error(additional(key), now=61.0) == 15
    later.desk.loading = False
    assert later.error(additional(key), now=61.0) == 13


def test_a_replayed_connection_brings_its_session_and_its_numbers() -> None:
    desk, key = with_session(client="me", client_id=b"i" * 16)
    later = Desk(started_at=50.0)
    session = later.desk.restore(desk.blob, 50.0)
    assert session is not None
    assert (session.name, session.key, session.client) == ("SID-U1-1", key, "me")
    assert session.unique_id == b"i" * 16
    assert later.desk.restore(desk.blob, 51.0) is session
    assert welcome_of(later.try_login(login())).connection_name == "CID-2"
