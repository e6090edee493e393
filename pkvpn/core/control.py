"""What an operator can ask of the control plane, in verbs.

Strategy: the same code whether the service runs or not.  A change goes to the database first; it is
answered after it is on disk and, if a core runs, after that has taken it over.  Without a core the
verbs that concern sessions answer that the service does not run.

A list that may be long comes in pages: who asks, asks again with ``after``, the key of the last
item that came, until nothing comes.
"""

import base64
import binascii
import heapq
import json
from collections import Counter
from collections.abc import Iterable
from operator import itemgetter
from typing import Any, NamedTuple, Protocol, TypeVar

from pkvpn.core.accounts import Accounts, Change, HubRecord
from pkvpn.core.certificates import CertificateError, read_certificate
from pkvpn.core.store import Store, StoreError
from pkvpn.protocol.hashes import user_key

# A user cannot log in with a longer one (SoftEther: MAX_PASSWORD_LEN).
MAX_PASSWORD = 255

# Items in one answer of a list, and their bytes as JSON: an answer has a limit of 64 KiB.
MAX_LIST = 500
MAX_LIST_BYTES = 48 << 10


class Refused(Exception):
    """Why something asked is not done: names the verb, the argument, the hub or the user."""


class SessionName(NamedTuple):
    """A living session."""

    generation: int
    session: int
    name: str


T = TypeVar("T")


def page_key(*names: object) -> tuple[str, str]:
    """By what a list is sorted: what tells an item from the others, joined by NUL."""
    key = "\0".join("" if name is None else str(name) for name in names)
    return key.lower(), key


class Page(NamedTuple):
    """A part of a long list: at most ``limit`` items behind the one with the key ``after``.

    What comes or goes between two pages moves nothing else: no other item is missed or told twice.
    """

    after: tuple[str, str]
    limit: int

    def of(self, found: Iterable[tuple[tuple[str, str], T]]) -> list[T]:
        """That part of these items, given with their keys in any order."""
        behind = [item for item in found if item[0] > self.after]
        return [item for _, item in heapq.nsmallest(self.limit, behind, key=itemgetter(0))]


class Live(Protocol):
    """The running core.  Each call runs in its loop and may raise TimeoutError."""

    def apply(self, changes: list[Change]) -> None:
        """Take over what is on disk now, with all it means for sessions and hubs."""

    def replace(self, accounts: Accounts) -> None:
        """The same, for all that is on disk."""

    def sessions(self, hub_id: int | None, page: Page) -> list[dict[str, Any]]:
        """The sessions of one hub or of all; their key is hub and name."""

    def sessions_not_shown(self, certificate: str) -> list[str]:
        """The sessions, as hub/name, with a connection that was shown another certificate than
        the one of this fingerprint."""

    def sessions_of_users(self, hub_id: int) -> dict[str, int]:
        """How many sessions each user of a hub has who has one."""

    def connections(self, page: Page) -> list[dict[str, Any]]:
        """Every connection; its key is its id."""

    def sessions_named(self, hub_id: int, name: str) -> list[SessionName]:
        """The sessions of this name, in any case."""

    def macs(self, hub_id: int, page: Page) -> list[dict[str, Any]]:
        """What the hub has learnt; its key is MAC and VLAN."""

    def hub(self, hub_id: int) -> dict[str, Any]:
        """Counters of one hub."""

    def bridges(self) -> dict[str, str]:
        """What each bridge is at, by device."""

    def quarantine(self) -> list[dict[str, Any]]:
        """Users ("HUB/USER") and addresses that are kept out, since what they sent killed."""

    def lift(self, name: str) -> bool:
        """Let one of them in again; False: he is not kept out."""

    def status(self) -> dict[str, Any]:
        """The core as a whole."""


Args = dict[str, Any]

_TYPES = {"text": str, "flag": bool, "number": int}


class _Verb(NamedTuple):
    """The arguments of a verb, name to type; ``hub.add`` is done by ``_hub_add``."""

    required: dict[str, str]
    optional: dict[str, str]


class Control:
    """Answers verbs.  ``live`` is None while the service does not run.

    ``accounts``: what ``live`` has loaded of the same ``store``; copied.  Whatever others have
    changed since is noticed by the first `refresh`.
    """

    def __init__(
        self, store: Store, live: Live | None = None, accounts: Accounts | None = None
    ) -> None:
        self._store = store
        self._live = live
        self._accounts = Accounts()
        self._accounts.replace(store.load() if accounts is None else accounts)

    def answer(self, verb: str, args: Args) -> Any:
        """Do it, and return what JSON can say.  Raises Refused."""
        known = _VERBS.get(verb)
        if known is None:
            raise Refused(f"unknown verb {verb!r}; known are {', '.join(sorted(_VERBS))}")
        _check_args(verb, known, args)
        try:
            self.refresh()
            return getattr(self, "_" + verb.replace(".", "_"))(args)
        except (StoreError, CertificateError) as error:
            raise Refused(str(error)) from error
        except TimeoutError:
            raise Refused(
                f"{verb}: the core's loop does not answer; a change asked for is on disk"
            ) from None

    def refresh(self) -> None:
        """Take over what another process has changed in the database.  Raises StoreError."""
        if self._store.changed_by_others():
            self._accounts = self._store.load()
            if self._live is not None:
                self._live.replace(self._accounts)

    # --- hubs

    def _hub_add(self, args: Args) -> Any:
        self._apply(
            self._store.add_hub(
                args["name"],
                online=args.get("online", True),
                max_sessions=args.get("max_sessions", 0),
                storm_frames=args.get("storm_frames", 0),
            )
        )
        return self._hub_show(args)

    def _hub_set(self, args: Args) -> Any:
        if len(args) == 1:
            raise Refused("hub.set: nothing to set; online, max_sessions, storm_frames can be")
        self._apply(
            self._store.set_hub(
                args["name"],
                online=args.get("online"),
                max_sessions=args.get("max_sessions"),
                storm_frames=args.get("storm_frames"),
            )
        )
        return self._hub_show(args)

    def _hub_list(self, args: Args) -> Any:
        hubs = _page(args).of((page_key(hub.name), hub) for hub in self._accounts.hubs.values())
        users = Counter(user.hub_id for user in self._accounts.users.values())
        return _fitting(self._describe(hub, users[hub.id]) for hub in hubs)

    def _hub_show(self, args: Args) -> Any:
        hub = self._hub(args["name"])
        shown = self._describe(hub, len(self._accounts.users_of(hub.id)))
        shown["bridges"] = [
            bridge.device for bridge in self._accounts.bridges.values() if bridge.hub_id == hub.id
        ]
        if self._live is not None:
            shown |= self._live.hub(hub.id)
        return shown

    def _hub_delete(self, args: Args) -> Any:
        name = self._hub(args["name"]).name
        self._apply(self._store.delete_hub(name))
        return {"deleted": name}

    def _describe(self, hub: HubRecord, users: int) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "name": hub.name,
            "online": hub.online,
            "max_sessions": hub.max_sessions,
            "storm_frames": hub.storm_frames,
            "users": users,
        }
        if self._live is not None:
            shown["sessions"] = self._live.hub(hub.id)["sessions"]
        return shown

    # --- users

    def _user_add(self, args: Args) -> Any:
        hub, name = args["hub"], args["name"]
        auth = args.get("auth", "certificate" if "certificate" in args else "password")
        password, certificate = _proof(auth, name, args)
        self._apply(
            self._store.add_user(hub, name, auth, password=password, certificate=certificate)
        )
        return {"hub": self._hub(hub).name, "name": name, "auth": auth}

    def _user_passwd(self, args: Args) -> Any:
        hub = self._hub(args["hub"])
        user = self._accounts.user(hub.id, args["name"])
        if user is None:
            raise Refused(f"hub {hub.name!r} has no user {args['name']!r}")
        password, _ = _proof("password", user.name, args)
        self._apply(self._store.set_user(hub.name, user.name, "password", password=password))
        return {"hub": hub.name, "name": user.name, "auth": "password"}

    def _user_list(self, args: Args) -> Any:
        hub = self._hub(args["hub"])
        users = _page(args).of(
            (page_key(user.name), user) for user in self._accounts.users_of(hub.id)
        )
        if self._live is None:
            return _fitting({"name": user.name, "auth": user.auth} for user in users)
        sessions = self._live.sessions_of_users(hub.id)
        return _fitting(
            {"name": user.name, "auth": user.auth, "sessions": sessions.get(user.name, 0)}
            for user in users
        )

    def _user_delete(self, args: Args) -> Any:
        self._apply(self._store.delete_user(args["hub"], args["name"]))
        return {"hub": self._hub(args["hub"]).name, "deleted": args["name"]}

    # --- sessions

    def _session_list(self, args: Args) -> Any:
        live = self._running("session.list")
        hub_id = self._hub(args["hub"]).id if "hub" in args else None
        return _fitting(live.sessions(hub_id, _page(args)))

    def _session_certificate(self, args: Args) -> Any:
        found = self._running("session.certificate").sessions_not_shown(args["fingerprint"])
        return {"concerned": len(found), "sessions": found[:_MOST_CONCERNED]}

    def _session_kick(self, args: Args) -> Any:
        live = self._running("session.kick")
        hub = self._hub(args["hub"])
        found = live.sessions_named(hub.id, args["name"])
        if not found:
            raise Refused(f"hub {hub.name!r} has no session {args['name']!r}")
        # On disk before the close is sent: whichever core the client comes back to, it is told 13.
        for session in found:
            self._apply(self._store.kick(session.generation, session.session))
        return {"hub": hub.name, "kicked": [session.name for session in found]}

    def _mac_list(self, args: Args) -> Any:
        live = self._running("mac.list")
        return _fitting(live.macs(self._hub(args["hub"]).id, _page(args)))

    def _connection_list(self, args: Args) -> Any:
        return _fitting(self._running("connection.list").connections(_page(args)))

    # --- bridges

    def _bridge_add(self, args: Args) -> Any:
        self._apply(
            self._store.add_bridge(args["hub"], args["device"], args.get("linux_bridge", ""))
        )
        return self._bridge(args["device"])

    def _bridge_list(self, _args: Args) -> Any:
        return [self._bridge(device) for device in sorted(self._accounts.bridges)]

    def _bridge_delete(self, args: Args) -> Any:
        self._apply(self._store.delete_bridge(args["device"]))
        result = {"deleted": args["device"]}
        if self._live is not None:
            result["note"] = "no frame passes any more; the device is closed by the next reload"
        return result

    def _bridge(self, device: str) -> dict[str, Any]:
        bridge = self._accounts.bridges[device]
        shown: dict[str, Any] = {
            "device": device,
            "hub": self._accounts.hubs[bridge.hub_id].name,
            "linux_bridge": bridge.linux_bridge,
        }
        if self._live is not None:
            shown["state"] = self._live.bridges().get(
                device, "not open: the device is opened by the next reload"
            )
        return shown

    # --- quarantine

    def _quarantine_list(self, _args: Args) -> Any:
        return _fitting(self._running("quarantine.list").quarantine())

    def _quarantine_lift(self, args: Args) -> Any:
        if not self._running("quarantine.lift").lift(args["name"]):
            raise Refused(f"{args['name']!r} is not in quarantine")
        return {"lifted": args["name"]}

    # --- the whole

    def _status(self, _args: Args) -> Any:
        counts: dict[str, Any] = {
            "hubs": len(self._accounts.hubs),
            "users": len(self._accounts.users),
            "bridges": len(self._accounts.bridges),
            "running": self._live is not None,
        }
        return counts if self._live is None else counts | self._live.status()

    # --- inside

    def _apply(self, changes: list[Change]) -> None:
        for change in changes:
            self._accounts.apply(change)
        if self._live is not None:
            self._live.apply(changes)

    def _hub(self, name: str) -> HubRecord:
        hub = self._accounts.hub(name)
        if hub is None:
            raise Refused(f"there is no hub {name!r}")
        return hub

    def _running(self, verb: str) -> Live:
        if self._live is None:
            raise Refused(f"{verb}: the service is not running, there are no sessions")
        return self._live


def _check_args(verb: str, known: _Verb, args: Args) -> None:
    for name, value in args.items():
        kind = known.required.get(name) or known.optional.get(name)
        if kind is None:
            names = ", ".join([*known.required, *known.optional]) or "none"
            raise Refused(f"{verb}: unknown argument {name!r}; known are {names}")
        # True is an int to Python, and no number to us.
        if not isinstance(value, _TYPES[kind]) or (kind == "number" and isinstance(value, bool)):
            raise Refused(f"{verb}: argument {name!r} is not a {kind}")
        if isinstance(value, str) and not _has_bytes(name, value):
            raise Refused(f"{verb}: argument {name!r} is a text that has no UTF-8")
    for name in known.required:
        if name not in args:
            raise Refused(f"{verb}: argument {name!r} is missing")


def _has_bytes(name: str, text: str) -> bool:
    """JSON can say what neither the database nor a hash can take: half a character."""
    # What is no UTF-8 at a terminal may be typed as a password, and Python escapes it so.
    how = "surrogateescape" if name == "password" else "strict"
    try:
        text.encode("utf-8", how)
    except UnicodeEncodeError:
        return False
    return True


def _proof(auth: str, name: str, args: Args) -> tuple[bytes, bytes]:
    """Password hash and certificate for the database."""
    for argument in ("password", "certificate"):
        if argument in args and auth != argument:
            raise Refused(f"user {name!r}: auth {auth!r} has no {argument}")
    if auth == "password":
        if not args.get("password"):
            raise Refused(f"user {name!r}: auth 'password' needs a password that is not empty")
        if len(args["password"].encode("utf-8", "replace")) > MAX_PASSWORD:
            raise Refused(f"user {name!r}: the password is longer than {MAX_PASSWORD} bytes")
        if "\0" in args["password"]:
            raise Refused(f"user {name!r}: the password has a NUL in it, clients cannot send that")
        return user_key(args["password"], name), b""
    if auth == "certificate":
        if "certificate" not in args:
            raise Refused(f"user {name!r}: auth 'certificate' needs a certificate (PEM)")
        return b"", read_certificate(_certificate_bytes(name, args["certificate"]))
    return b"", b""


def _certificate_bytes(name: str, text: str) -> bytes:
    """PEM as it is, or the base64 of DER."""
    if "-----BEGIN" in text:
        return text.encode()
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(f"user {name!r}: the certificate is neither PEM nor base64 of DER") from None


def _page(args: Args) -> Page:
    limit = args.get("limit", MAX_LIST)
    if not 1 <= limit <= MAX_LIST:
        raise Refused(f"limit is {limit}, it must be between 1 and {MAX_LIST}")
    return Page(page_key(args.get("after", "")), limit)


def _fitting(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many as fit into an answer, and one at least if there is one."""
    fitting: list[dict[str, Any]] = []
    size = 0
    for item in items:
        size += len(json.dumps(item)) + 2
        if fitting and size > MAX_LIST_BYTES:
            break
        fitting.append(item)
    return fitting


# Sessions that a new certificate concerns are named up to so many.
_MOST_CONCERNED = 20

_HUB_OPTIONS = {"online": "flag", "max_sessions": "number", "storm_frames": "number"}
_USER = {"hub": "text", "name": "text"}
_PAGE = {"after": "text", "limit": "number"}
_VERBS = {
    "hub.add": _Verb({"name": "text"}, _HUB_OPTIONS),
    "hub.set": _Verb({"name": "text"}, _HUB_OPTIONS),
    "hub.list": _Verb({}, _PAGE),
    "hub.show": _Verb({"name": "text"}, {}),
    "hub.delete": _Verb({"name": "text"}, {}),
    "user.add": _Verb(_USER, {"auth": "text", "password": "text", "certificate": "text"}),
    "user.passwd": _Verb(_USER | {"password": "text"}, {}),
    "user.list": _Verb({"hub": "text"}, _PAGE),
    "user.delete": _Verb(_USER, {}),
    "session.list": _Verb({}, {"hub": "text"} | _PAGE),
    "session.kick": _Verb(_USER, {}),
    "session.certificate": _Verb({"fingerprint": "text"}, {}),
    "mac.list": _Verb({"hub": "text"}, _PAGE),
    "connection.list": _Verb({}, _PAGE),
    "bridge.add": _Verb({"hub": "text", "device": "text"}, {"linux_bridge": "text"}),
    "bridge.list": _Verb({}, {}),
    "bridge.delete": _Verb({"device": "text"}, {}),
    "quarantine.list": _Verb({}, {}),
    "quarantine.lift": _Verb({"name": "text"}, {}),
    "status": _Verb({}, {}),
}
