"""What can be wrong with a peer, as an exception for us and as a code for the peer."""

from __future__ import annotations

from enum import IntEnum


class ErrorCode(IntEnum):
    """The codes a refusal carries (SoftEther: ERR_*), with what a stock client does next.

    Most make it wait its retry interval.  `HUB_STOPPED`, `HUB_FULL`,
    `TOO_MANY_USER_SESSIONS` and `LICENCE` make it wait 60 s whatever is configured, so
    prefer `ACCESS_DENIED` or `SERVER_CANT_ACCEPT` if clients should come back soon.
    In reply to an additional connection `SESSION_TIMEOUT` and `INVALID_PROTOCOL` end the
    session; any other code makes the client try again after 1 s.
    """

    OK = 0  # ERR_NO_ERROR
    CONNECT_FAILED = 1  # ERR_CONNECT_FAILED
    NOT_VPN_SERVER = 2  # ERR_SERVER_IS_NOT_VPN
    DISCONNECTED = 3  # ERR_DISCONNECTED
    PROTOCOL_ERROR = 4  # ERR_PROTOCOL_ERROR
    AUTH_TYPE_NOT_SUPPORTED = 7  # ERR_AUTHTYPE_NOT_SUPPORTED
    HUB_NOT_FOUND = 8  # ERR_HUB_NOT_FOUND
    AUTH_FAILED = 9  # ERR_AUTH_FAILED
    HUB_STOPPED = 10  # ERR_HUB_STOPPING
    ACCESS_DENIED = 12  # ERR_ACCESS_DENIED
    SESSION_TIMEOUT = 13  # ERR_SESSION_TIMEOUT
    INVALID_PROTOCOL = 14  # ERR_INVALID_PROTOCOL
    TOO_MANY_CONNECTIONS = 15  # ERR_TOO_MANY_CONNECTION
    HUB_FULL = 16  # ERR_HUB_IS_BUSY
    TOO_MANY_USER_SESSIONS = 20  # ERR_TOO_MANY_USER_SESSION
    LICENCE = 21  # ERR_NOT_ENOUGH_LICENSE
    OBJECT_NOT_FOUND = 29  # ERR_OBJECT_NOT_FOUND
    NOT_SUPPORTED = 33  # ERR_NOT_SUPPORTED
    EMPTY_PASSWORD_ONLY_LOCALLY = 51  # ERR_NULL_PASSWORD_LOCAL_ONLY
    NOT_ENOUGH_RIGHT = 52  # ERR_NOT_ENOUGH_RIGHT
    HUB_EXISTS = 57  # ERR_HUB_ALREADY_EXISTS
    USER_EXISTS = 66  # ERR_USER_ALREADY_EXISTS
    VERSION_INVALID = 87  # ERR_VERSION_INVALID
    SERVER_CANT_ACCEPT = 105  # ERR_SERVER_CANT_ACCEPT
    MONITOR_MODE_DENIED = 107  # ERR_MONITOR_MODE_DENIED
    BRIDGE_MODE_DENIED = 108  # ERR_BRIDGE_MODE_DENIED
    ADDRESS_DENIED = 109  # ERR_IP_ADDRESS_DENIED


# In reply to an additional connection these say that the session is gone for good.
SESSION_ENDED = frozenset({ErrorCode.SESSION_TIMEOUT, ErrorCode.INVALID_PROTOCOL})

_MEANINGS = {
    ErrorCode.OK: "no error",
    ErrorCode.CONNECT_FAILED: "connection failed",
    ErrorCode.NOT_VPN_SERVER: "not a VPN server",
    ErrorCode.DISCONNECTED: "disconnected",
    ErrorCode.PROTOCOL_ERROR: "protocol error",
    ErrorCode.AUTH_TYPE_NOT_SUPPORTED: "kind of authentication not supported",
    ErrorCode.HUB_NOT_FOUND: "no such hub",
    ErrorCode.AUTH_FAILED: "authentication failed",
    ErrorCode.HUB_STOPPED: "hub is stopped",
    ErrorCode.ACCESS_DENIED: "access denied",
    ErrorCode.SESSION_TIMEOUT: "session has ended",
    ErrorCode.INVALID_PROTOCOL: "invalid protocol",
    ErrorCode.TOO_MANY_CONNECTIONS: "too many connections in the session",
    ErrorCode.HUB_FULL: "hub is full",
    ErrorCode.TOO_MANY_USER_SESSIONS: "too many sessions of this user",
    ErrorCode.LICENCE: "no licence left",
    ErrorCode.OBJECT_NOT_FOUND: "no such object",
    ErrorCode.NOT_SUPPORTED: "not supported",
    ErrorCode.EMPTY_PASSWORD_ONLY_LOCALLY: "an empty password is accepted locally only",
    ErrorCode.NOT_ENOUGH_RIGHT: "not enough rights",
    ErrorCode.HUB_EXISTS: "hub exists already",
    ErrorCode.USER_EXISTS: "user exists already",
    ErrorCode.VERSION_INVALID: "version not accepted",
    ErrorCode.SERVER_CANT_ACCEPT: "server cannot accept now",
    ErrorCode.MONITOR_MODE_DENIED: "monitor mode denied",
    ErrorCode.BRIDGE_MODE_DENIED: "bridge mode denied",
    ErrorCode.ADDRESS_DENIED: "address denied",
}


def meaning(code: int) -> str:
    """The code in words; unknown codes are named by their number."""
    try:
        return _MEANINGS[ErrorCode(code)]
    except ValueError:
        return f"error {code}"


class ProtocolError(Exception):
    """A peer broke the protocol.

    ``code`` is what the peer is told, if it is told anything: `ErrorCode.DISCONNECTED`
    when its bytes could not be read, `ErrorCode.PROTOCOL_ERROR` when they could but make
    no sense.
    """

    def __init__(self, text: str, code: ErrorCode = ErrorCode.DISCONNECTED) -> None:
        super().__init__(text)
        self.code = code
