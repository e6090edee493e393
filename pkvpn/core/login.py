"""What to answer to the HTTP requests of a connection, up to the first byte of its data phase.

Strategy: one request in, one `Outcome` out; the caller passes the time and the randomness, and what
a connection is at is in its `Blob`, so any core can answer the next request.  Whatever the client
asks for, the server decides: TLS, no compression, no priority connections, no UDP.

A failed login costs the same work whether hub, user or password is wrong, and is told apart only by
the two codes that users need to see (8 no such hub, 9 not authenticated).
"""

import functools
import hmac
import ipaddress
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pkvpn.core import certificates
from pkvpn.core.accounts import Accounts, HubRecord, UserRecord
from pkvpn.core.attempts import Attempts
from pkvpn.core.blob import Blob, Stage
from pkvpn.core.session import Claim, Session, SessionKeys, Sessions
from pkvpn.core.settings import CoreSettings
from pkvpn.protocol import http
from pkvpn.protocol.errors import ErrorCode, ProtocolError, meaning
from pkvpn.protocol.hashes import secure_password, user_key
from pkvpn.protocol.messages import (
    POLICY,
    AdditionalConnect,
    AdditionalReply,
    Admin,
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

# Bytes of fresh randomness that `LoginDesk.answer` needs: the Hello's, and two for a session.
RANDOM_SIZE = 22

# As the original, before a client has shown that it is one.
MAX_REQUESTS = 19
# A client that was refused goes; one that tries again and again on one connection is none.
MAX_REFUSALS = 3

# The hub that only the canary knows, and its user.  No database can hold this name, this
# generation, or this number.
CANARY_HUB = ".canary"
CANARY_HUB_ID = -1
CANARY_USER = "canary"
CANARY_GENERATION = 0

_NO_KEY = bytes(20)

# From where users have logged in with success: so many are remembered.
_MAX_FAMILIAR = 8192


@functools.lru_cache(maxsize=1024)  # it is asked several times in one login
def address_key(peer: str) -> str:
    """What attempts are counted by: an IPv4 address, or the /64 of an IPv6 address.

    ``peer`` as the edge writes it: "192.0.2.1:50000" or "[2001:db8::1]:50000".
    """
    text = peer.rpartition(":")[0].strip("[]")
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return text
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address, 64), strict=False))


@dataclass(slots=True)
class Outcome:
    """The answer to one request."""

    reply: bytes = b""
    close: str = ""  # why the connection is to be closed behind the reply; "": it is not
    session: Session | None = None  # the connection is part of it from now on
    replaces: Session | None = None  # a stale session of the same client, to be ended
    displaces: tuple[int, ...] = ()  # of the session, lost by the client: to be closed
    note: str = ""  # for the log


class _Who(NamedTuple):
    """A user that has proved its identity."""

    hub_id: int
    user_id: int
    name: str
    generation: int


class LoginDesk:
    """Answers.  ``canary_password``: of the canary's user; empty: there is no canary."""

    def __init__(
        self,
        accounts: Accounts,
        sessions: Sessions,
        keys: SessionKeys,
        settings: CoreSettings,
        canary_password: str = "",
    ) -> None:
        self._accounts = accounts
        self._sessions = sessions
        self._keys = keys
        self._settings = settings
        self._by_address = Attempts(
            failures=settings.address_failures, interval=settings.address_failure_interval
        )
        self._by_user = Attempts(
            failures=settings.user_failures, interval=settings.user_failure_interval
        )
        # (address, user), the latest success last: whoever guesses a user's password from many
        # addresses must not keep the user itself out.
        self._familiar: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._canary: UserRecord | None = None
        if canary_password:
            self._canary = UserRecord(
                0,
                CANARY_HUB_ID,
                CANARY_USER,
                "password",
                user_key(canary_password, CANARY_USER),
                b"",
                CANARY_GENERATION,
            )
        # Is the user "HUB/NAME" in quarantine at this time?
        self.kept_out: Callable[[str, float], bool] = lambda _name, _now: False
        # True until every edge has told what it has: a session that is not known may still come.
        self.loading = True
        self.refused: dict[int, int] = {}  # code -> how often

    def answer(self, blob: Blob, address: str, raw: bytes, now: float, random: bytes) -> Outcome:
        """Answer one whole request; ``blob`` is changed to what the connection is at then.

        ``address``: of the peer, without the port.  ``random``: RANDOM_SIZE fresh bytes.
        """
        try:
            request = http.parse_request(raw)
        except ProtocolError as error:
            return Outcome(close=f"no request: {error}")
        blob.requests = min(blob.requests + 1, 255)
        if blob.stage is Stage.FRESH:
            return self._greet(blob, request, random)
        if blob.stage is Stage.GREETED:
            return self._admit(blob, address, request, now, random)
        return Outcome(close="a request behind the login")

    # --- before anybody knows that this is a client

    def _greet(self, blob: Blob, request: http.Request, random: bytes) -> Outcome:
        method, target = request.method, request.target
        if blob.requests > MAX_REQUESTS:
            return Outcome(close=f"more than {MAX_REQUESTS} requests that are not a client's")
        if method == "OPTIONS":
            return Outcome()  # the original says nothing; the time limit of the login ends it
        if method not in ("GET", "HEAD", "POST"):
            return Outcome(http.build_error_page(501, method, target))
        if target.startswith(("/api/", "/admin/")):
            return Outcome(http.build_error_page(401, method, target))
        if method != "POST":
            if target != "/":
                return Outcome(http.build_error_page(404, method, target))
            if "x-vpn" in request.headers:
                return Outcome(http.build_probe_page())
            return Outcome(http.build_error_page(403, method, target))
        if target != http.CONNECT_TARGET:
            return Outcome(http.build_error_page(404, method, target))
        if not http.is_signature(request.body):
            return Outcome(http.build_error_page(403, method, target))
        blob.stage = Stage.GREETED
        blob.random = random[:20]
        return _pack(Hello(blob.random, self._settings.server_name).to_pack())

    # --- packs

    def _admit(
        self, blob: Blob, address: str, request: http.Request, now: float, random: bytes
    ) -> Outcome:
        kind = request.headers.get("content-type", "")
        try:
            if (
                request.method != "POST"
                or request.target != http.VPN_TARGET
                or kind.lower() != http.PACK_TYPE
                or not request.body
            ):
                raise ProtocolError(f"{request.method} {request.target[:40]} instead of a pack")
            message = read_client_message(Pack.decode(request.body))
        except ProtocolError as error:
            return self._refuse(blob, error.code, str(error))
        match message:
            case Noop():
                return _pack(Noop().to_pack())
            case Login():
                return self._log_in(blob, address, message, now, random)
            case AdditionalConnect():
                return self._add_connection(blob, address, message, now)
            case Admin():
                return self._refuse(blob, ErrorCode.NOT_SUPPORTED, "administration")

    def _refuse(self, blob: Blob, code: ErrorCode, note: str) -> Outcome:
        blob.refusals = min(blob.refusals + 1, 255)
        self.refused[code] = self.refused.get(code, 0) + 1
        outcome = _pack(ErrorReply(code).to_pack())
        outcome.note = f"refused with {int(code)} ({meaning(code)}): {note}"
        if blob.refusals >= MAX_REFUSALS:
            outcome.close = f"{blob.refusals} refusals"
        return outcome

    # --- login

    def _log_in(self, blob: Blob, address: str, login: Login, now: float, random: bytes) -> Outcome:
        name = f"user {login.user!r} of hub {login.hub!r}"
        if not login.hub or not login.user:
            return self._refuse(blob, ErrorCode.PROTOCOL_ERROR, "a login without names")
        if login.auth_type not in tuple(AuthType):
            return self._refuse(
                blob, ErrorCode.AUTH_TYPE_NOT_SUPPORTED, f"{name}: type {login.auth_type}"
            )
        who = f"{login.hub}\0{login.user}".lower()
        if login.hub != CANARY_HUB and not self._may_try(address, who, now):
            return self._refuse(
                blob, ErrorCode.SERVER_CANT_ACCEPT, f"{name}: too many failures, from {address}"
            )
        if self.kept_out(f"{login.hub}/{login.user}", now):
            return self._refuse(blob, ErrorCode.SERVER_CANT_ACCEPT, f"{name}: in quarantine")
        hub_known, user = self._find_user(login.hub, login.user)
        if not _proved(user, login, blob.random):
            self._by_address.failed(address, now)
            self._by_user.failed(who, now)
            code = ErrorCode.AUTH_FAILED if hub_known else ErrorCode.HUB_NOT_FOUND
            return self._refuse(blob, code, f"{name}, from {address}")
        assert user is not None
        self._remember(address, who)
        if login.monitor_mode:
            return self._refuse(blob, ErrorCode.MONITOR_MODE_DENIED, name)
        hub = self._accounts.hubs.get(user.hub_id)
        if hub is not None and not hub.online:
            return self._refuse(blob, ErrorCode.HUB_STOPPED, f"{name}: the hub is offline")
        stale = self._stale_session(user, _unique_id(login))
        if hub is not None and self._is_full(hub, stale):
            # 16 says the same, but makes clients wait for 60 s whatever they are set to.
            return self._refuse(
                blob,
                ErrorCode.SERVER_CANT_ACCEPT,
                f"{name}: the hub has {hub.max_sessions} sessions, its limit",
            )
        outcome = self._welcome(blob, login, user, now=now, random=random)
        outcome.replaces = stale
        return outcome

    def _may_try(self, address: str, who: str, now: float) -> bool:
        return self._by_address.allows(address, now) and (
            (address, who) in self._familiar or self._by_user.allows(who, now)
        )

    def _remember(self, address: str, who: str) -> None:
        self._familiar[address, who] = None
        self._familiar.move_to_end((address, who))
        if len(self._familiar) > _MAX_FAMILIAR:
            self._familiar.popitem(last=False)

    def _welcome(
        self, blob: Blob, login: Login, user: UserRecord, *, now: float, random: bytes
    ) -> Outcome:
        most = min(login.max_connection, self._settings.max_connections)
        # One connection each way, or it is not half duplex.
        half = login.half_connection and most >= 2
        session = self._sessions.open(
            hub_id=user.hub_id,
            user_id=user.id,
            user=user.name,
            generation=user.generation,
            half=half,
            max_connection=most,
            random=random[20:22],
            unique_id=_unique_id(login),
            client=login.client,
            now=now,
        )
        number = self._sessions.next_connection_number()
        self._join(blob, session, session.first_direction(), number)
        welcome = Welcome(
            session_name=session.name,
            connection_name=f"CID-{number}",
            session_key=session.key,
            timeout=self._settings.session_timeout,
            max_connection=most,
            half_connection=half,
            policy={**POLICY, "MaxConnection": most, "NoBridge": int(not login.bridge_mode)},
        )
        outcome = Outcome(http.build_pack_response(welcome.encode()))
        outcome.session = session
        outcome.note = f"{session.name}: logged in"
        return outcome

    def _find_user(self, hub_name: str, user_name: str) -> tuple[bool, UserRecord | None]:
        if self._canary is not None and hub_name == CANARY_HUB:
            # To everybody else there is no such hub.
            return False, self._canary if user_name == CANARY_USER else None
        hub = self._accounts.hub(hub_name)
        return hub is not None, self._accounts.user(hub.id, user_name) if hub else None

    def _stale_session(self, user: UserRecord, unique_id: bytes) -> Session | None:
        """A session of the same client that has lost its connections: it will not come back."""
        if not unique_id:
            return None
        for session in self._sessions.orphans():
            if session.user_id == user.id and session.unique_id == unique_id:
                return session
        return None

    def _is_full(self, hub: HubRecord, stale: Session | None) -> bool:
        count = self._sessions.count(hub.id) - (stale is not None)
        return 0 < hub.max_sessions <= count

    # --- more connections of a session

    def _add_connection(
        self, blob: Blob, address: str, message: AdditionalConnect, now: float
    ) -> Outcome:
        claim = self._keys.read(message.session_key)
        who = self._holder(claim)
        if claim is None or who is None:
            return self._refuse(
                blob, ErrorCode.SESSION_TIMEOUT, f"a session key that is worth nothing, {address}"
            )
        hub = self._accounts.hubs.get(who.hub_id)
        if hub is not None and not hub.online:
            return self._refuse(blob, ErrorCode.SESSION_TIMEOUT, "the hub is offline")
        if hub is not None and self.kept_out(f"{hub.name}/{who.name}", now):
            return self._refuse(
                blob, ErrorCode.SESSION_TIMEOUT, f"user {who.name!r}: in quarantine"
            )
        session = self._sessions.find(claim)
        if session is None:
            if not self._sessions.may_rebuild(claim, now):
                # Not while it may still be replayed: 13 would end the client's session.
                loading = self.loading
                code = ErrorCode.TOO_MANY_CONNECTIONS if loading else ErrorCode.SESSION_TIMEOUT
                return self._refuse(blob, code, f"session {claim.session >> 16} is not known")
            session = self._sessions.rebuild(
                claim,
                hub_id=who.hub_id,
                user_id=who.user_id,
                user=who.name,
                created_at=now,
                now=now,
            )
            session.client = message.client
        displaces: tuple[int, ...] = ()
        if len(session.connections) >= claim.max_connection:
            if claim.max_connection > 1:
                return self._refuse(blob, ErrorCode.TOO_MANY_CONNECTIONS, session.name)
            # It may have one, and has just made another: it has lost the first, which we shall
            # only learn after T.  (Two, if a core died between telling two edges.)
            displaces = tuple(session.connections)
        direction = session.next_direction()
        self._join(blob, session, direction, self._sessions.next_connection_number())
        outcome = _pack(AdditionalReply(direction).to_pack())
        outcome.session = session
        outcome.displaces = displaces
        outcome.note = f"{session.name}: one more connection"
        return outcome

    def _holder(self, claim: Claim | None) -> _Who | None:
        """Whose key it is, if it is worth anything."""
        if claim is None:
            return None
        if claim.generation == CANARY_GENERATION:
            if self._canary is None:
                return None
            return _Who(CANARY_HUB_ID, self._canary.id, CANARY_USER, CANARY_GENERATION)
        user = self._accounts.user_of_generation(claim.generation)
        if user is None or (claim.generation, claim.session) in self._accounts.kicked:
            return None
        return _Who(user.hub_id, user.id, user.name, user.generation)

    def user_of(self, blob: Blob) -> str:
        """Of the session that a connection is part of, as "HUB/NAME"; "" if there is none."""
        who = self._holder(self._keys.read(blob.key))
        hub = self._accounts.hubs.get(who.hub_id) if who is not None else None
        return f"{hub.name}/{who.name}" if who is not None and hub is not None else ""

    def restore(self, blob: Blob, now: float) -> Session | None:
        """The session of a replayed connection; None: its key is worth nothing any more."""
        claim = self._keys.read(blob.key)
        who = self._holder(claim)
        if claim is None or who is None:
            return None
        hub = self._accounts.hubs.get(who.hub_id)
        if hub is not None and not hub.online:
            return None
        session = self._sessions.find(claim)
        if session is None:
            if self._sessions.taken(claim):
                return None
            session = self._sessions.rebuild(
                claim,
                hub_id=who.hub_id,
                user_id=who.user_id,
                user=who.name,
                created_at=blob.created_at,
                now=now,
            )
        session.unique_id = blob.unique_id
        session.client = blob.client
        session.created_at = min(session.created_at, blob.created_at)
        self._sessions.connection_seen(blob.connection_number)
        return session

    def _join(self, blob: Blob, session: Session, direction: Direction, number: int) -> None:
        blob.stage = Stage.IN_SESSION
        blob.key = session.key
        blob.direction = direction
        blob.created_at = session.created_at
        blob.unique_id = session.unique_id
        blob.connection_number = number
        blob.client = session.client


def _unique_id(login: Login) -> bytes:
    """Of the client's installation; empty if it does not say in the way of stock clients."""
    return login.client_id if len(login.client_id) == 16 else b""


def _proved(user: UserRecord | None, login: Login, random: bytes) -> bool:
    """Is it this user?  The same work for a user that does not exist."""
    stored = user.password if user is not None and user.password else _NO_KEY
    proved = False
    if login.auth_type == AuthType.PASSWORD:
        wanted = secure_password(stored, random)
        proved = hmac.compare_digest(wanted, login.secure_password)
    elif login.auth_type == AuthType.PLAIN_PASSWORD:
        given = user_key(login.plain_password, login.user)
        proved = hmac.compare_digest(stored, given)
    elif login.auth_type == AuthType.CERTIFICATE:
        certificate = user.certificate if user is not None else b""
        proved = certificates.has_signed(certificate, login.signature, random)
        proved &= hmac.compare_digest(certificate, login.certificate)
    if user is None:
        return False
    if user.auth == "anonymous":
        return True
    expected = "certificate" if login.auth_type == AuthType.CERTIFICATE else "password"
    return proved and user.auth == expected


def _pack(pack: Pack) -> Outcome:
    return Outcome(http.build_pack_response(pack.encode()))
