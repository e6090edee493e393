"""What outlives the core: hubs, users and bridges in SQLite, the session secret in a file.

Strategy: a method of `Store` that changes something returns after the change is on the disk
(WAL, synchronous=FULL) and says in `Change`s what it was, for an `Accounts`.  So the loop of the
core reads without waiting for a disk, and what it has seen is always durable already.

Every user row has a *generation*, a number that is never given twice in one database.  It is in the
session keys; a new password, a deletion or a re-creation gives another, and the old keys are worth
nothing from then on.  Session keys that were kicked one by one are listed in ``kicked``.
"""

import contextlib
import os
import re
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from pkvpn.core.accounts import (
    Accounts,
    BridgeGone,
    BridgeRecord,
    Change,
    HubGone,
    HubRecord,
    Kicked,
    UserGone,
    UserRecord,
    name_key,
)

FILE_NAME = "pkvpn.db"
SECRET_NAME = "session.key"  # noqa: S105  the name of a file
SECRET_SIZE = 32
SCHEMA_VERSION = 1

# Kicked sessions of one generation of a user; at the limit the user gets a new generation, which
# ends the keys of all its sessions and empties the list.
MAX_KICKED = 256

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_USER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
# IFNAMSIZ is 16 with the NUL.
_DEVICE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")

AUTH_TYPES = ("anonymous", "password", "certificate")

# AUTOINCREMENT: a number is never used twice, so what refers to a deleted row finds nothing.
_SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO settings VALUES ('generation', 0);
CREATE TABLE hubs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    name_key TEXT NOT NULL UNIQUE,
    online INTEGER NOT NULL,
    max_sessions INTEGER NOT NULL,
    storm_frames INTEGER NOT NULL
);
CREATE TABLE users (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    hub_id INTEGER NOT NULL REFERENCES hubs (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    name_key TEXT NOT NULL,
    auth TEXT NOT NULL,
    password BLOB NOT NULL,
    certificate BLOB NOT NULL,
    generation INTEGER NOT NULL UNIQUE,
    UNIQUE (hub_id, name_key)
);
CREATE TABLE bridges (
    device TEXT PRIMARY KEY,
    hub_id INTEGER NOT NULL REFERENCES hubs (id) ON DELETE CASCADE,
    linux_bridge TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE kicked (
    generation INTEGER NOT NULL,
    session INTEGER NOT NULL,
    PRIMARY KEY (generation, session)
) WITHOUT ROWID;
"""


class StoreError(Exception):
    """A change that is not possible, or a database that cannot be used; names which and why."""


def _check_name(kind: str, pattern: re.Pattern[str], name: str) -> None:
    if not pattern.fullmatch(name):
        raise StoreError(f"{name!r} is no name of a {kind}: it must match {pattern.pattern}")


class Store:
    """The database file.  One thread at a time; other processes may use the same file.

    Every method raises StoreError, which names the hub, user or bridge and the cause.
    """

    def __init__(self, state_dir: str) -> None:
        self.path = str(Path(state_dir) / FILE_NAME)
        try:
            created = _create_private(self.path)
            # The thread that opens it is not the one that uses it: see StoreThread.
            self._db = sqlite3.connect(
                self.path, timeout=5.0, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"database {self.path}: {error}") from error
        try:
            with self._errors():
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
                self._db.execute("PRAGMA foreign_keys=ON")
                self._make_schema()
                self._version = self._data_version()
            if created:
                _sync_directory(state_dir)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file; every change is on disk already."""
        self._db.close()

    def load(self) -> Accounts:
        """Read everything."""
        accounts = Accounts()
        with self._errors():
            self._version = self._data_version()
            for row in self._db.execute(
                "SELECT id, name, online, max_sessions, storm_frames FROM hubs"
            ):
                accounts.apply(HubRecord(row[0], row[1], bool(row[2]), row[3], row[4]))
            for row in self._db.execute(
                "SELECT id, hub_id, name, auth, password, certificate, generation FROM users"
            ):
                accounts.apply(UserRecord(*row))
            for row in self._db.execute("SELECT device, hub_id, linux_bridge FROM bridges"):
                accounts.apply(BridgeRecord(*row))
            for row in self._db.execute("SELECT generation, session FROM kicked"):
                accounts.apply(Kicked(*row))
        return accounts

    def changed_by_others(self) -> bool:
        """True once after another process has changed the file: load() again."""
        with self._errors():
            version = self._data_version()
        changed = version != self._version
        self._version = version
        return changed

    # --- hubs

    def add_hub(
        self, name: str, *, online: bool = True, max_sessions: int = 0, storm_frames: int = 0
    ) -> list[Change]:
        """A new hub without users."""
        _check_name("hub", _HUB_NAME, name)
        _check_number("max_sessions", max_sessions)
        _check_number("storm_frames", storm_frames)
        with self._change(), self._unique(f"hub {name!r} exists already"):
            row = self._db.execute(
                "INSERT INTO hubs (name, name_key, online, max_sessions, storm_frames)"
                " VALUES (?, ?, ?, ?, ?)",
                (name, name_key(name), online, max_sessions, storm_frames),
            )
            hub_id = row.lastrowid
        assert hub_id is not None
        return [HubRecord(hub_id, name, online, max_sessions, storm_frames)]

    def set_hub(
        self,
        name: str,
        *,
        online: bool | None = None,
        max_sessions: int | None = None,
        storm_frames: int | None = None,
    ) -> list[Change]:
        """Change what is not None."""
        with self._change():
            hub = self._hub(name)
            if online is not None:
                hub = hub._replace(online=online)
            if max_sessions is not None:
                _check_number("max_sessions", max_sessions)
                hub = hub._replace(max_sessions=max_sessions)
            if storm_frames is not None:
                _check_number("storm_frames", storm_frames)
                hub = hub._replace(storm_frames=storm_frames)
            self._db.execute(
                "UPDATE hubs SET online = ?, max_sessions = ?, storm_frames = ? WHERE id = ?",
                (hub.online, hub.max_sessions, hub.storm_frames, hub.id),
            )
        return [hub]

    def delete_hub(self, name: str) -> list[Change]:
        """The hub with its users and bridges."""
        with self._change():
            hub = self._hub(name)
            self._db.execute(
                "DELETE FROM kicked WHERE generation IN"
                " (SELECT generation FROM users WHERE hub_id = ?)",
                (hub.id,),
            )
            self._db.execute("DELETE FROM hubs WHERE id = ?", (hub.id,))
        return [HubGone(hub.id)]

    # --- users

    def add_user(
        self, hub: str, name: str, auth: str, *, password: bytes = b"", certificate: bytes = b""
    ) -> list[Change]:
        """A new user; ``password`` is H of the protocol (20 bytes), ``certificate`` DER."""
        _check_name("user", _USER_NAME, name)
        _check_proof(name, auth, password, certificate)
        with self._change(), self._unique(f"user {name!r} of hub {hub!r} exists already"):
            hub_id = self._hub(hub).id
            generation = self._next_generation()
            row = self._db.execute(
                "INSERT INTO users"
                " (hub_id, name, name_key, auth, password, certificate, generation)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (hub_id, name, name_key(name), auth, password, certificate, generation),
            )
            user_id = row.lastrowid
        assert user_id is not None
        return [UserRecord(user_id, hub_id, name, auth, password, certificate, generation)]

    def set_user(
        self, hub: str, name: str, auth: str, *, password: bytes = b"", certificate: bytes = b""
    ) -> list[Change]:
        """A new proof of identity; the keys of all sessions of the user are worth nothing now."""
        _check_proof(name, auth, password, certificate)
        with self._change():
            user = self._user(hub, name)
            user = self._renew(user)._replace(auth=auth, password=password, certificate=certificate)
            self._db.execute(
                "UPDATE users SET auth = ?, password = ?, certificate = ? WHERE id = ?",
                (auth, password, certificate, user.id),
            )
        return [user]

    def delete_user(self, hub: str, name: str) -> list[Change]:
        """The user; its sessions' keys are worth nothing now."""
        with self._change():
            user = self._user(hub, name)
            self._db.execute("DELETE FROM kicked WHERE generation = ?", (user.generation,))
            self._db.execute("DELETE FROM users WHERE id = ?", (user.id,))
        return [UserGone(user.id)]

    def kick(self, generation: int, session: int) -> list[Change]:
        """The key of this session is worth nothing from now on."""
        with self._change():
            self._db.execute(
                "INSERT OR IGNORE INTO kicked (generation, session) VALUES (?, ?)",
                (generation, session),
            )
            (count,) = self._db.execute(
                "SELECT count(*) FROM kicked WHERE generation = ?", (generation,)
            ).fetchone()
            if count > MAX_KICKED:
                row = self._db.execute(
                    "SELECT id, hub_id, name, auth, password, certificate, generation"
                    " FROM users WHERE generation = ?",
                    (generation,),
                ).fetchone()
                if row is not None:
                    return [self._renew(UserRecord(*row))]
        return [Kicked(generation, session)]

    # --- bridges

    def add_bridge(self, hub: str, device: str, linux_bridge: str = "") -> list[Change]:
        """Join a hub to the TAP ``device``, and that to ``linux_bridge`` unless it is empty."""
        _check_name("network device", _DEVICE_NAME, device)
        if linux_bridge:
            _check_name("network device", _DEVICE_NAME, linux_bridge)
        with self._change(), self._unique(f"bridge {device!r} exists already"):
            bridge = BridgeRecord(device, self._hub(hub).id, linux_bridge)
            self._db.execute(
                "INSERT INTO bridges (device, hub_id, linux_bridge) VALUES (?, ?, ?)", bridge
            )
        return [bridge]

    def delete_bridge(self, device: str) -> list[Change]:
        """The bridge of this device."""
        with self._change():
            gone = self._db.execute("DELETE FROM bridges WHERE device = ?", (device,)).rowcount
            if not gone:
                raise StoreError(f"there is no bridge {device!r}")
        return [BridgeGone(device)]

    # --- inside

    def _make_schema(self) -> None:
        with self._change():
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                raise StoreError(
                    f"database {self.path} has schema version {version},"
                    f" this program knows version {SCHEMA_VERSION}"
                )

    def _data_version(self) -> int:
        (version,) = self._db.execute("PRAGMA data_version").fetchone()
        return int(version)

    def _hub(self, name: str) -> HubRecord:
        row = self._db.execute(
            "SELECT id, name, online, max_sessions, storm_frames FROM hubs WHERE name_key = ?",
            (name_key(name),),
        ).fetchone()
        if row is None:
            raise StoreError(f"there is no hub {name!r}")
        return HubRecord(row[0], row[1], bool(row[2]), row[3], row[4])

    def _user(self, hub: str, name: str) -> UserRecord:
        row = self._db.execute(
            "SELECT id, hub_id, name, auth, password, certificate, generation FROM users"
            " WHERE hub_id = ? AND name_key = ?",
            (self._hub(hub).id, name_key(name)),
        ).fetchone()
        if row is None:
            raise StoreError(f"hub {hub!r} has no user {name!r}")
        return UserRecord(*row)

    def _renew(self, user: UserRecord) -> UserRecord:
        self._db.execute("DELETE FROM kicked WHERE generation = ?", (user.generation,))
        user = user._replace(generation=self._next_generation())
        self._db.execute("UPDATE users SET generation = ? WHERE id = ?", (user.generation, user.id))
        return user

    def _next_generation(self) -> int:
        self._db.execute("UPDATE settings SET value = value + 1 WHERE name = 'generation'")
        (value,) = self._db.execute(
            "SELECT value FROM settings WHERE name = 'generation'"
        ).fetchone()
        if value >= 1 << 32:
            raise StoreError("the generations of users are used up")
        return int(value)

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        """One transaction.  It is on disk when this ends without an error."""
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OverflowError) as error:
            raise StoreError(f"database {self.path}: {error}") from error

    @contextlib.contextmanager
    def _unique(self, text: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError as error:
            raise StoreError(text) from error


def _check_number(name: str, value: int) -> None:
    if not 0 <= value < 1 << 31:
        raise StoreError(f"{name} is {value}, it must be between 0 and {(1 << 31) - 1}")


def _check_proof(name: str, auth: str, password: bytes, certificate: bytes) -> None:
    if auth not in AUTH_TYPES:
        raise StoreError(f"user {name!r}: auth is {auth!r}, it must be one of {AUTH_TYPES}")
    if len(password) != (20 if auth == "password" else 0):
        raise StoreError(
            f"user {name!r}: auth {auth} with a password hash of {len(password)} bytes"
        )
    if bool(certificate) != (auth == "certificate"):
        raise StoreError(
            f"user {name!r}: auth {auth} with a certificate of {len(certificate)} bytes"
        )


def _create_private(path: str) -> bool:
    """Make an empty file for its owner only, unless it exists; SQLite's others get its mode."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    return True


def _sync_directory(path: str) -> None:
    if os.name == "nt":
        return  # Windows opens no directories
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_bridges(state_dir: str) -> list[BridgeRecord]:
    """The bridges whose TAPs are to be opened; none if there is no database yet.

    Raises StoreError.
    """
    if not (Path(state_dir) / FILE_NAME).exists():
        return []
    store = Store(state_dir)
    try:
        return list(store.load().bridges.values())
    finally:
        store.close()


def session_secret(state_dir: str) -> bytes:
    """The 32 bytes under which session keys are signed; the first call makes them.

    Raises StoreError.
    """
    path = Path(state_dir) / SECRET_NAME
    try:
        if not path.exists():
            _make_secret(path)
        secret = path.read_bytes()
    except OSError as error:
        raise StoreError(f"session secret {path}: {error.strerror}") from error
    if len(secret) != SECRET_SIZE:
        raise StoreError(f"session secret {path} has {len(secret)} bytes, not {SECRET_SIZE}")
    return secret


def _make_secret(path: Path) -> None:
    new = path.with_name(f"{path.name}.{os.getpid()}")
    # Through a file: as bytes that nobody translates, on Windows either.
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(secrets.token_bytes(SECRET_SIZE))
        file.flush()
        os.fsync(file.fileno())
    try:
        # A link, not a rename: of two processes that start at once the first one's secret counts.
        with contextlib.suppress(FileExistsError):
            os.link(new, path)
        _sync_directory(str(path.parent))
    finally:
        new.unlink()
