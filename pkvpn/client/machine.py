"""What the client says on one connection, and when it dials again.

Strategy: no socket, clock or randomness in here.  `Stream` is one TLS connection from its
first byte to its last; `Comeback` outlives the connections of one client and knows how and
when to make the next.  The shell passes in bytes, ``now`` (seconds, monotonic) and a
function that returns random bytes; it sends what lies in ``Stream.output``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from pkvpn.protocol import blocks, hashes, http
from pkvpn.protocol.errors import SESSION_ENDED, ErrorCode, ProtocolError
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
from pkvpn.protocol.pack import Pack

CLIENT_NAME = "pkvpn client"

# How long the stock client waits for each answer before the data phase.
READ_TIMEOUT = 15.0
# A welcome may carry a long message for the user; a pack to us has a limit all the same.
MAX_REPLY_PACK = http.MAX_RESPONSE_BODY

Random: TypeAlias = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who logs in where, and how it is proven; made by the ``with_`` functions."""

    hub: str
    user: str
    auth_type: AuthType
    key: bytes = b""  # PASSWORD: `hashes.user_key`
    password: str = ""  # PLAIN_PASSWORD
    certificate: bytes = b""  # CERTIFICATE: DER
    sign: Callable[[bytes], bytes] | None = None  # CERTIFICATE: PKCS#1 v1.5 with SHA-1

    def __repr__(self) -> str:
        return f"Credentials(hub={self.hub!r}, user={self.user!r})"

    @classmethod
    def with_password(cls, hub: str, user: str, password: str) -> Credentials:
        """The usual way: the password is hashed with the server's random, never sent."""
        key = hashes.user_key(password, user)
        return cls(hub, user, AuthType.PASSWORD, key=key)

    @classmethod
    def with_plain_password(cls, hub: str, user: str, password: str) -> Credentials:
        """The password is sent as it is: for users that the server checks elsewhere."""
        return cls(hub, user, AuthType.PLAIN_PASSWORD, password=password)

    @classmethod
    def anonymous(cls, hub: str, user: str) -> Credentials:
        """Nothing is proven."""
        return cls(hub, user, AuthType.ANONYMOUS)

    @classmethod
    def with_certificate(
        cls, hub: str, user: str, certificate: bytes, sign: Callable[[bytes], bytes]
    ) -> Credentials:
        """``sign`` signs the server's 20 random bytes: RSA, PKCS#1 v1.5, SHA-1."""
        return cls(hub, user, AuthType.CERTIFICATE, certificate=certificate, sign=sign)

    def login(self, random: bytes) -> Login:
        """The login for a connection whose Hello had that random."""
        secure = b""
        if self.auth_type is AuthType.PASSWORD:
            secure = hashes.secure_password(self.key, random)
        return Login(
            hub=self.hub,
            user=self.user,
            auth_type=self.auth_type,
            secure_password=secure,
            plain_password=self.password,
            certificate=self.certificate,
            signature=b"" if self.sign is None else self.sign(random),
            client=CLIENT_NAME,
            node=Node(product=CLIENT_NAME),
        )


@dataclass(frozen=True, slots=True)
class Frames:
    """Event: frames came."""

    frames: list[bytes]


@dataclass(frozen=True, slots=True)
class Lost:
    """Event: the peer was silent for too long."""

    why: str


# Welcome: the login succeeded.  AdditionalReply: the session goes on.  Both: the data phase
# has begun.  ErrorReply: the server refused, and the stream is over.
Event: TypeAlias = Welcome | AdditionalReply | ErrorReply | Frames | Lost


class Step(Enum):
    """What the stream waits for."""

    PROBE = "the probe page"
    HELLO = "the Hello"
    REPLY = "the reply to the login"
    DATA = "frames"
    ENDED = "nothing"


class Stream:
    """One connection, from the end of its TLS handshake on.

    ``purpose`` is `Credentials` for a login, or the `Welcome` of a session that goes on.
    ``output`` is what must be sent; the shell deletes what it has sent.  The only exception
    that leaves ``receive`` is `ProtocolError`: the connection is to be closed then.
    """

    __slots__ = (
        "_cutter",
        "_decoder",
        "_heard_at",
        "_host",
        "_keep_alive_at",
        "_purpose",
        "_random",
        "_timeout",
        "_units",
        "output",
        "step",
    )

    def __init__(
        self,
        purpose: Credentials | Welcome,
        *,
        host: str,
        now: float,
        random: Random,
        probe: bool = False,
    ) -> None:
        self._purpose = purpose
        self._host = host
        self._random = random
        self._cutter: http.ResponseCutter | None = http.ResponseCutter()
        self._decoder = blocks.BlockDecoder()
        self._units = 0
        self._timeout = READ_TIMEOUT
        self._heard_at = now
        self._keep_alive_at = 0.0
        self.output = bytearray()
        if probe:
            self.step = Step.PROBE
            self.output += http.build_request("GET", "/", host=host)
        else:
            self._introduce()

    def receive(self, data: bytes, now: float) -> list[Event]:
        """To be called with what came."""
        events: list[Event] = []
        if self._cutter is not None:
            self._cutter.feed(data)
            while self.step not in (Step.DATA, Step.ENDED):
                response = self._cutter.cut()
                if response is None:
                    return events
                self._heard_at = now
                event = self._answer(response)
                if event is not None:
                    events.append(event)
            data = self._cutter.rest()
            self._cutter = None  # thousands of streams hold one no longer than they need it
            if self.step is Step.DATA:
                self._keep_alive(now)
        if self.step is Step.DATA and data:
            frames = self._decoder.feed(data)
            if self._decoder.units != self._units:
                self._units = self._decoder.units
                self._heard_at = now
            if frames:
                events.append(Frames(frames))
        return events

    def send(self, frames: Sequence[bytes], now: float) -> None:
        """Put frames into ``output``; to be called in the data phase only."""
        assert self.step is Step.DATA
        for batch in blocks.encode_batches(frames):
            self.output += batch
            self._postpone_keep_alive(now)

    def next_deadline(self) -> float | None:
        """When `expire` wants to be called."""
        if self.step is Step.ENDED:
            return None
        silent_at = self._heard_at + self._timeout
        return min(silent_at, self._keep_alive_at) if self.step is Step.DATA else silent_at

    def expire(self, now: float) -> list[Event]:
        """To be called when a deadline has come; harmless before."""
        if self.step is Step.ENDED:
            return []
        if now >= self._heard_at + self._timeout:
            why = f"waited {self._timeout:g} s for {self.step.value}"
            self.step = Step.ENDED
            return [Lost(why)]
        if self.step is Step.DATA and now >= self._keep_alive_at:
            self._keep_alive(now)
        return []

    # Before the data phase

    def _introduce(self) -> None:
        self.step = Step.HELLO
        self._post(http.CONNECT_TARGET, http.IMAGE_TYPE, http.SIGNATURE)

    def _post(self, target: str, content_type: str, body: bytes) -> None:
        self.output += http.build_request(
            "POST", target, host=self._host, content_type=content_type, body=body
        )

    def _answer(self, response: http.Response) -> Event | None:
        if self.step is Step.PROBE:
            if http.PROBE_MARK.encode() not in response.body[:1023]:
                raise ProtocolError("the page at / lacks the mark of a VPN server")
            self._introduce()
            return None
        if not response.is_pack:
            raise ProtocolError(f"status {response.status} instead of {self.step.value}")
        pack = Pack.decode(response.body, max_size=MAX_REPLY_PACK)
        refusal = ErrorReply.find(pack)
        if refusal is not None:
            self.step = Step.ENDED
            return refusal
        if pack.get_int("noop"):
            self._post(http.VPN_TARGET, http.PACK_TYPE, self._encode(Noop().to_pack()))
            return None
        if self.step is Step.HELLO:
            self._log_in(Hello.from_pack(pack))
            return None
        return self._begin(pack)

    def _log_in(self, hello: Hello) -> None:
        self.step = Step.REPLY
        if isinstance(self._purpose, Credentials):
            pack = self._purpose.login(hello.random).to_pack()
        else:
            pack = AdditionalConnect(self._purpose.session_key, CLIENT_NAME).to_pack()
        self._post(http.VPN_TARGET, http.PACK_TYPE, self._encode(pack))

    def _encode(self, pack: Pack) -> bytes:
        # Padding as the originals have it, so that lengths do not tell names.
        size = int.from_bytes(self._random(2), "big") % 1000
        pack.put_data("pencore", self._random(size))
        return pack.encode()

    def _begin(self, pack: Pack) -> Welcome | AdditionalReply:
        if isinstance(self._purpose, Credentials):
            welcome = Welcome.from_pack(pack)
            _check_supported(welcome)
            self._timeout = welcome.timeout
            self._purpose = welcome  # the password is needed no longer
            self.step = Step.DATA
            return welcome
        reply = AdditionalReply.from_pack(pack)
        if reply.direction is not Direction.BOTH:
            raise ProtocolError(f"server wants a connection {reply.direction.name}, not both ways")
        self._timeout = self._purpose.timeout
        self.step = Step.DATA
        return reply

    # In the data phase

    def _keep_alive(self, now: float) -> None:
        # 4 to 499 bytes, as seen from the originals; 0 and 512 would be ignored.
        size = 4 + int.from_bytes(self._random(2), "big") % 496
        self.output += blocks.encode_keep_alive(self._random(size))
        self._postpone_keep_alive(now)

    def _postpone_keep_alive(self, now: float) -> None:
        share = int.from_bytes(self._random(2), "big") / 65536
        self._keep_alive_at = now + self._timeout * (0.2 + 0.3 * share)


def _check_supported(welcome: Welcome) -> None:
    wanted = {
        "no encryption": not welcome.use_encrypt,
        "compression": welcome.use_compress,
        "half duplex": welcome.half_connection,
        "a time-out of 0": welcome.timeout <= 0,
    }
    for name, is_wanted in wanted.items():
        if is_wanted:
            raise ProtocolError(f"server wants {name}, which this client does not do")


class Comeback:
    """Knows whether the session lives, and when the next connection is made.

    A live session is resumed: at once, then every ``retry`` seconds, until nothing was
    heard for the session's time-out or the server says that it has ended.  After that come
    full logins, with a backoff that doubles up to ``cap`` and is never the same for two
    clients, so that those of a dead server do not return in step.
    """

    __slots__ = (
        "_cap",
        "_dial_at",
        "_dialled_at",
        "_failures",
        "_heard_at",
        "_random",
        "_retry",
        "session",
    )

    def __init__(
        self, random: Random, *, now: float, retry: float = 1.0, cap: float = 60.0
    ) -> None:
        self._random = random
        self._retry = retry
        self._cap = cap
        self._failures = 0  # full logins that failed, one after the other
        self._heard_at = now
        self._dialled_at = now
        self._dial_at: float | None = now
        self.session: Welcome | None = None

    def next_deadline(self) -> float | None:
        """When to make a connection; None while there is one."""
        return self._dial_at

    def dial(self, now: float) -> Welcome | None:
        """To be called when a connection is made now.  The session to resume, if it lives."""
        self._dialled_at = now
        self._dial_at = None
        return self.session

    def welcomed(self, welcome: Welcome, now: float) -> None:
        """To be called when a login succeeded."""
        self.session = welcome
        self._failures = 0
        self._heard_at = now
        # The first resumption comes at once, however short ago the login was.
        self._dialled_at = now - self._retry

    def heard(self, now: float) -> None:
        """To be called when something came in the data phase."""
        self._heard_at = now

    def lost(self, now: float) -> None:
        """To be called when the connection is gone, or could not be made."""
        session = self.session
        if session is not None:
            again_at = max(now, self._dialled_at + self._retry)
            if again_at < self._heard_at + session.timeout:
                self._dial_at = again_at
                return
            self.session = None
        self._back_off(now)

    def refused(self, code: int, now: float) -> None:
        """To be called when the server refused with ``code``."""
        if self.session is None or code in SESSION_ENDED:
            self.session = None
            self._back_off(now)
        else:
            self.lost(now)

    def end_session(self, now: float) -> None:
        """To be called when the session must not be resumed, whatever the server says."""
        self.refused(ErrorCode.SESSION_TIMEOUT, now)

    def _back_off(self, now: float) -> None:
        # The exponent is bounded before it makes numbers of a thousand digits.
        pause = min(self._cap, self._retry * 2.0 ** min(self._failures, 32))
        share = int.from_bytes(self._random(2), "big") / 65536
        self._dial_at = now + pause * (0.5 + 0.5 * share)
        self._failures += 1
