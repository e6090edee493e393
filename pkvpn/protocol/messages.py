"""The packs of the login, as objects: Hello, login, welcome, additional connection, refusal.

Strategy: server and client use the same classes, so each is read and written here.  What
is not in a class is left to its default on the way out and ignored on the way in.  Text
and blobs of a stranger are bounded here, before anything hashes or stores them.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address
from types import MappingProxyType
from typing import TypeAlias

from pkvpn.protocol.errors import ErrorCode, ProtocolError
from pkvpn.protocol.hashes import HASH_SIZE, RANDOM_SIZE
from pkvpn.protocol.pack import Elements, Pack, join

# What we claim to be: stock programs of this version were tried against us.
VERSION = 501  # CEDAR_VER
BUILD = 9674  # CEDAR_BUILD

SESSION_KEY_SIZE = 20  # SHA1_SIZE
MAX_TEXT = 255  # MAX_USERNAME_LEN, MAX_HUBNAME_LEN, MAX_PASSWORD_LEN, MAX_SERVER_STR_LEN
MAX_CERTIFICATE = 16384

_LOGIN = "login"
_ADDITIONAL_CONNECT = "additional_connect"
_ADMIN = "admin"


class AuthType(IntEnum):
    """How a client proves who its user is (SoftEther: CLIENT_AUTHTYPE_*)."""

    ANONYMOUS = 0  # CLIENT_AUTHTYPE_ANONYMOUS
    PASSWORD = 1  # CLIENT_AUTHTYPE_PASSWORD: hashed with the random of the Hello
    PLAIN_PASSWORD = 2  # CLIENT_AUTHTYPE_PLAIN_PASSWORD
    CERTIFICATE = 3  # CLIENT_AUTHTYPE_CERT


class Direction(IntEnum):
    """Which way frames travel on one connection of a session (SoftEther: TCP_*)."""

    BOTH = 0  # TCP_BOTH
    TO_CLIENT = 1  # TCP_SERVER_TO_CLIENT
    TO_SERVER = 2  # TCP_CLIENT_TO_SERVER


@dataclass(frozen=True, slots=True)
class Hello:
    """Server to client, in answer to the signature."""

    random: bytes  # RANDOM_SIZE bytes, new for every connection
    product: str = "pkvpn"
    version: int = VERSION
    build: int = BUILD

    def to_pack(self) -> Pack:
        """Write it."""
        pack = Pack()
        pack.put_str("hello", self.product)
        pack.put_int("version", self.version)
        pack.put_int("build", self.build)
        pack.put_data("random", self.random)
        return pack

    @classmethod
    def from_pack(cls, pack: Pack) -> Hello:
        """Read it; raises `ProtocolError` without a random of the right size."""
        return cls(
            random=_sized(pack, "random", RANDOM_SIZE),
            product=_shown(pack, "hello"),
            version=pack.get_int("version"),
            build=pack.get_int("build"),
        )


@dataclass(frozen=True, slots=True)
class Node:
    """What a client tells about itself and its machine; for lists and logs only."""

    product: str = ""
    product_version: int = 0
    product_build: int = 0
    hostname: str = ""
    os: str = ""
    os_version: str = ""
    address: IPv4Address | IPv6Address | None = None
    port: int = 0

    def put_into(self, pack: Pack) -> None:
        """Add it to the pack of a login."""
        pack.put_str("ClientHostname", self.hostname)
        pack.put_str("ClientOsName", self.os)
        pack.put_str("ClientOsVer", self.os_version)
        pack.put_str("ClientProductName", self.product)
        # These integers travel with their bytes swapped: 9674 as ca 25 00 00.
        pack.put_int("ClientProductVer", _swapped(self.product_version))
        pack.put_int("ClientProductBuild", _swapped(self.product_build))
        pack.put_int("ClientPort", _swapped(self.port))
        if self.address is not None:
            pack.put_ip("ClientIpAddress", self.address)

    @classmethod
    def from_pack(cls, pack: Pack) -> Node:
        """Read it from the pack of a login; nothing in it is required."""
        return cls(
            product=_shown(pack, "ClientProductName"),
            product_version=_swapped(pack.get_int("ClientProductVer")),
            product_build=_swapped(pack.get_int("ClientProductBuild")),
            hostname=_shown(pack, "ClientHostname"),
            os=_shown(pack, "ClientOsName"),
            os_version=_shown(pack, "ClientOsVer"),
            address=pack.get_ip("ClientIpAddress"),
            port=_swapped(pack.get_int("ClientPort")),
        )


@dataclass(frozen=True, slots=True)
class Login:
    """Client to server: who wants into which hub, and how it proves it.

    ``auth_type`` stays a number, since a peer may send any; compare it with `AuthType`.
    Names keep the case they came in and compare without regard to it.
    """

    hub: str
    user: str
    auth_type: int
    secure_password: bytes = b""  # PASSWORD: HASH_SIZE bytes
    plain_password: str = ""  # PLAIN_PASSWORD
    certificate: bytes = b""  # CERTIFICATE: DER
    signature: bytes = b""  # CERTIFICATE: PKCS#1 v1.5 with SHA-1 over the random
    max_connection: int = 1
    use_encrypt: bool = True
    use_compress: bool = False
    half_connection: bool = False
    qos: bool = False
    bridge_mode: bool = False
    monitor_mode: bool = False
    machine_id: bytes = b""  # the same for all clients of one machine
    client_id: bytes = b""  # one installation of a client
    client: str = ""
    client_version: int = VERSION
    client_build: int = BUILD
    node: Node = Node()

    def __repr__(self) -> str:
        # It ends up in logs and crash reports: no password, no hash of one.
        return f"Login(hub={self.hub!r}, user={self.user!r}, auth_type={self.auth_type})"

    def to_pack(self) -> Pack:
        """Write it."""
        pack = Pack()
        pack.put_str("method", _LOGIN)
        pack.put_str("hubname", self.hub)
        pack.put_str("username", self.user)
        pack.put_int("authtype", self.auth_type)
        if self.auth_type == AuthType.PASSWORD:
            pack.put_data("secure_password", self.secure_password)
        elif self.auth_type == AuthType.PLAIN_PASSWORD:
            pack.put_str("plain_password", self.plain_password)
        elif self.auth_type == AuthType.CERTIFICATE:
            pack.put_data("cert", self.certificate)
            pack.put_data("sign", self.signature)
        _put_client(pack, self.client, self.client_version, self.client_build)
        pack.put_int("max_connection", self.max_connection)
        pack.put_int("use_encrypt", self.use_encrypt)
        pack.put_int("use_compress", self.use_compress)
        pack.put_int("half_connection", self.half_connection)
        pack.put_int("qos", self.qos)
        pack.put_int("require_bridge_routing_mode", self.bridge_mode)
        pack.put_int("require_monitor_mode", self.monitor_mode)
        if self.machine_id:
            pack.put_data("unique_id", self.machine_id)
        if self.client_id:
            pack.put_data("UniqueId", self.client_id)
        self.node.put_into(pack)
        return pack

    @classmethod
    def from_pack(cls, pack: Pack) -> Login:
        """Read it; raises `ProtocolError` without names or with too long a value."""
        if "hubname" not in pack or "username" not in pack:
            raise ProtocolError("login without the names of hub and user", _NO_SENSE)
        return cls(
            hub=_text(pack, "hubname"),
            user=_text(pack, "username"),
            auth_type=pack.get_int("authtype"),
            secure_password=_bounded(pack, "secure_password", HASH_SIZE),
            plain_password=_text(pack, "plain_password"),
            certificate=_bounded(pack, "cert", MAX_CERTIFICATE),
            signature=_bounded(pack, "sign", MAX_CERTIFICATE),
            # A peer that leaves it out means one; it is never above 32.
            max_connection=min(max(pack.get_int("max_connection"), 1), 32),
            use_encrypt=bool(pack.get_int("use_encrypt")),
            use_compress=bool(pack.get_int("use_compress")),
            half_connection=bool(pack.get_int("half_connection")),
            qos=bool(pack.get_int("qos")),
            bridge_mode=bool(pack.get_int("require_bridge_routing_mode")),
            monitor_mode=bool(pack.get_int("require_monitor_mode")),
            machine_id=_bounded(pack, "unique_id", MAX_TEXT),
            client_id=_bounded(pack, "UniqueId", MAX_TEXT),
            client=_shown(pack, "client_str") or _shown(pack, "hello"),
            client_version=pack.get_int("client_ver") or pack.get_int("version"),
            client_build=pack.get_int("client_build") or pack.get_int("build"),
            node=Node.from_pack(pack),
        )


@dataclass(frozen=True, slots=True)
class AdditionalConnect:
    """Client to server: this connection belongs to the session with that key.

    There is no other proof of identity: compare the key in constant time.
    """

    session_key: bytes  # SESSION_KEY_SIZE bytes
    client: str = ""
    client_version: int = VERSION
    client_build: int = BUILD

    def __repr__(self) -> str:
        return f"AdditionalConnect(client={self.client!r})"  # the key opens the session

    def to_pack(self) -> Pack:
        """Write it."""
        pack = Pack()
        pack.put_str("method", _ADDITIONAL_CONNECT)
        pack.put_data("session_key", self.session_key)
        _put_client(pack, self.client, self.client_version, self.client_build)
        return pack

    @classmethod
    def from_pack(cls, pack: Pack) -> AdditionalConnect:
        """Read it; raises `ProtocolError` without a key of the right size."""
        return cls(
            session_key=_sized(pack, "session_key", SESSION_KEY_SIZE),
            client=_shown(pack, "client_str"),
            client_version=pack.get_int("client_ver"),
            client_build=pack.get_int("client_build"),
        )


@dataclass(frozen=True, slots=True)
class Admin:
    """Client to server: this connection is for administration (vpncmd)."""

    secure_password: bytes
    hub: str = ""  # empty: the whole server

    @classmethod
    def from_pack(cls, pack: Pack) -> Admin:
        """Read it; raises `ProtocolError` with too long a value."""
        return cls(_bounded(pack, "secure_password", HASH_SIZE), _text(pack, "hubname"))


@dataclass(frozen=True, slots=True)
class Noop:
    """Either way: nothing yet, wait (a user looks at a dialog)."""

    def to_pack(self) -> Pack:
        """Write it."""
        pack = Pack()
        pack.put_int("error", 0)
        pack.put_int("noop", 1)
        return pack


ClientMessage: TypeAlias = Login | AdditionalConnect | Admin | Noop


def read_client_message(pack: Pack) -> ClientMessage:
    """What a client wants after the Hello.

    Raises `ProtocolError` with code `ErrorCode.PROTOCOL_ERROR` for no or an unknown method.
    """
    if pack.get_int("noop"):
        return Noop()
    method = pack.get_str("method")
    match method.lower():
        case "login":
            return Login.from_pack(pack)
        case "additional_connect":
            return AdditionalConnect.from_pack(pack)
        case "admin":
            return Admin.from_pack(pack)
    raise ProtocolError(f"unknown method {method[:40]!r}", _NO_SENSE)


# What the client may do, as the original sends it.  Of these a stock client acts only on
# NoSavePassword, which erases the stored password, and AutoDisconnect, seconds until it
# leaves for good: both stay 0.
POLICY: Mapping[str, int] = MappingProxyType(
    {
        "Access": 1,
        "DHCPFilter": 0,
        "DHCPNoServer": 0,
        "DHCPForce": 0,
        "NoBridge": 1,
        "NoRouting": 1,
        "PrivacyFilter": 0,
        "NoServer": 0,
        "CheckMac": 0,
        "CheckIP": 0,
        "ArpDhcpOnly": 0,
        "MonitorPort": 0,
        "NoBroadcastLimiter": 0,
        "FixPassword": 0,
        "NoQoS": 0,
        "RSandRAFilter": 0,
        "RAFilter": 0,
        "DHCPv6Filter": 0,
        "DHCPv6NoServer": 0,
        "NoRoutingV6": 0,
        "CheckIPv6": 0,
        "NoServerV6": 0,
        "NoSavePassword": 0,
        "FilterIPv4": 0,
        "FilterIPv6": 0,
        "FilterNonIP": 0,
        "NoIPv6DefaultRouterInRA": 0,
        "NoIPv6DefaultRouterInRAWhenIPv6": 0,
        "Ver3": 1,
        "MaxConnection": 32,
        "TimeOut": 20,
        "MaxMac": 0,
        "MaxIP": 0,
        "MaxUpload": 0,
        "MaxDownload": 0,
        "MultiLogins": 0,
        "MaxIPv6": 0,
        "AutoDisconnect": 0,
        "VLanId": 0,
    }
)
_POLICY_PREFIX = "policy:"


@dataclass(frozen=True, slots=True)
class Welcome:
    """Server to client: the session is there; the next byte is the data phase's.

    All of it is the server's decision, whatever the client asked for.  ``timeout`` is in
    seconds: how long the session lives without a connection, and how long a connection
    may be silent.
    """

    session_name: str
    connection_name: str
    session_key: bytes  # SESSION_KEY_SIZE bytes, unguessable
    timeout: float
    max_connection: int = 1
    use_encrypt: bool = True  # False: raw TCP from here on
    use_compress: bool = False
    half_connection: bool = False
    qos: bool = False
    message: str = ""  # shown to the user
    policy: Mapping[str, int] = field(default_factory=lambda: POLICY)

    def __repr__(self) -> str:
        return f"Welcome(session_name={self.session_name!r}, timeout={self.timeout})"

    def encode(self) -> bytes:
        """Write the whole pack.  There is one for every login: what many have in common, which is
        most of it, is written once."""
        own = Pack()
        own.put_str("session_name", self.session_name)
        own.put_str("connection_name", self.connection_name)
        own.put_data("session_key", self.session_key)
        # Used for nothing by anybody; the first bytes of the key, so that it is no secret
        # of its own.
        own.put_int("session_key_32", int.from_bytes(self.session_key[:4], "big"))
        common = _granted(
            self.timeout,
            self.max_connection,
            self.use_encrypt,
            self.use_compress,
            self.half_connection,
            self.qos,
            self.message,
            tuple(self.policy.items()),
        )
        return join(own.written(), common)

    @classmethod
    def from_pack(cls, pack: Pack) -> Welcome:
        """Read it as a stock client does; raises `ProtocolError` for what it needs."""
        return cls(
            session_name=_required(pack, "session_name"),
            connection_name=_required(pack, "connection_name"),
            session_key=_sized(pack, "session_key", SESSION_KEY_SIZE),
            timeout=pack.get_int("timeout") / 1000,
            max_connection=min(max(pack.get_int("max_connection"), 1), 32),
            use_encrypt=bool(pack.get_int("use_encrypt")),
            use_compress=bool(pack.get_int("use_compress")),
            half_connection=bool(pack.get_int("half_connection")),
            qos=bool(pack.get_int("qos")),
            message=pack.get_data("Msg").decode("utf-8", "replace"),
            policy={
                name: pack.get_int(_POLICY_PREFIX + name)
                for name in POLICY
                if _POLICY_PREFIX + name in pack
            },
        )


@functools.lru_cache(maxsize=256)
def _granted(
    timeout: float,
    max_connection: int,
    use_encrypt: bool,
    use_compress: bool,
    half_connection: bool,
    qos: bool,
    message: str,
    policy: tuple[tuple[str, int], ...],
) -> Elements:
    """The part of a welcome that says what the client may do."""
    pack = Pack()
    pack.put_int("max_connection", max_connection)
    pack.put_int("use_encrypt", use_encrypt)
    pack.put_int("use_compress", use_compress)
    pack.put_int("half_connection", half_connection)
    pack.put_int("timeout", round(timeout * 1000))
    pack.put_int("qos", qos)
    pack.put_int("is_azure_session", 0)
    pack.put_int("vlan_id", 0)
    pack.put_int("enable_udp_recovery", 0)
    pack.put_int("suppress_client_update_notification", 0)
    pack.put_data("Msg", message.encode("utf-8", "replace"))
    for name, value in policy:
        pack.put_int(_POLICY_PREFIX + name, value)
    return pack.written()


@dataclass(frozen=True, slots=True)
class AdditionalReply:
    """Server to client: the connection is part of the session; the data phase follows."""

    direction: Direction = Direction.BOTH

    def to_pack(self) -> Pack:
        """Write it."""
        pack = Pack()
        pack.put_int("error", 0)
        pack.put_int("direction", self.direction)
        return pack

    @classmethod
    def from_pack(cls, pack: Pack) -> AdditionalReply:
        """Read it; raises `ProtocolError` for an unknown direction."""
        number = pack.get_int("direction")
        try:
            return cls(Direction(number))
        except ValueError:
            raise ProtocolError(f"unknown direction {number}", _NO_SENSE) from None


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """Server to client, in place of any other pack: no, and why."""

    code: int  # an `ErrorCode`, or any number a server may send; never 0

    def to_pack(self) -> Pack:
        """Write it."""
        pack = Pack()
        pack.put_int("error", self.code)
        pack.put_int("no_save_password", 0)
        return pack

    @classmethod
    def find(cls, pack: Pack) -> ErrorReply | None:
        """The refusal in the pack, if it is one."""
        code = pack.get_int("error")
        return cls(code) if code else None


_NO_SENSE = ErrorCode.PROTOCOL_ERROR
_BIG = struct.Struct("!I")
_LITTLE = struct.Struct("<I")


def _swapped(number: int) -> int:
    swapped: int = _LITTLE.unpack(_BIG.pack(number & 0xFFFFFFFF))[0]
    return swapped


def _put_client(pack: Pack, client: str, version: int, build: int) -> None:
    pack.put_str("client_str", client)
    pack.put_int("client_ver", version)
    pack.put_int("client_build", build)


def _text(pack: Pack, name: str) -> str:
    text = pack.get_str(name)
    if len(text.encode("utf-8", "replace")) > MAX_TEXT:
        raise ProtocolError(f"{name!r} is longer than {MAX_TEXT} bytes", _NO_SENSE)
    return text


def _shown(pack: Pack, name: str) -> str:
    # For lists and logs: too long a name of a machine is no reason to refuse its user.
    return pack.get_str(name)[:MAX_TEXT]


def _required(pack: Pack, name: str) -> str:
    text = _text(pack, name)
    if not text:
        raise ProtocolError(f"{name!r} is missing", _NO_SENSE)
    return text


def _bounded(pack: Pack, name: str, size: int) -> bytes:
    data = pack.get_data(name)
    if len(data) > size:
        raise ProtocolError(f"{name!r} has {len(data)} bytes, at most {size}", _NO_SENSE)
    return data


def _sized(pack: Pack, name: str, size: int) -> bytes:
    data = pack.get_data(name)
    if len(data) != size:
        raise ProtocolError(f"{name!r} has {len(data)} bytes, not {size}", _NO_SENSE)
    return data
