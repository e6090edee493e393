"""What the operator may set: every key with its default, its limits and its sentence.

Strategy: each key stands once, as a field of a frozen dataclass that carries its check and its
sentence.  Reading a file, `config show`, the table of defaults in the documentation and the errors
are all made from these fields.  `load` never stops at the first error: it collects all of them,
each with file, line, key, value and what is allowed.  Nothing heavy is imported, since every verb
of the command line comes through here.
"""

import os
import socket
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

# sun_path has 108 bytes, the last one a NUL (unix(7)).
SOCKET_PATH_MAX = 107

# Made by `install`.
CORE_USER, EDGE_USER = "pkvpn-core", "pkvpn-edge"

# The ports of the manual, in the order in which clients try them.
DEFAULT_PORTS = (443, 992, 8888)


class ConfigError(Exception):
    """What is wrong with the configuration; `errors` has a sentence for each thing."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors


class Address(NamedTuple):
    """Where to listen: a numeric IPv4 or IPv6 address and a TCP port (0: the system picks one)."""

    host: str
    port: int

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Read "192.0.2.1:443" or "[2001:db8::1]:443"; ValueError for anything else."""
    host, colon, port = text.rpartition(":")
    family = socket.AF_INET
    if host.startswith("[") and host.endswith("]"):
        host, family = host[1:-1], socket.AF_INET6
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(text)
    try:
        socket.inet_pton(family, host)
    except OSError:
        raise ValueError(text) from None
    return Address(host, int(port))


# --- what a key may hold -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Key:
    """One key: its sentence, what is allowed, and how a TOML value becomes ours.

    `read` raises ValueError for what is not allowed; its text, if any, says which part of a list
    was wrong.
    """

    doc: str
    allowed: str
    read: Callable[[Any], Any]
    # How the default is written in the documentation, where it depends on the mode.
    shown: str | None = None


def _number(lowest: float, highest: float, unit: str, *, whole: bool) -> tuple[str, Any]:
    def read(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise ValueError
        if not lowest <= value <= highest:
            raise ValueError
        return value if whole else float(value)

    kind = "a whole number" if whole else "a number"
    return f"{kind} from {lowest:g} to {highest:g}{unit}", read


def _seconds(default: float, lowest: float, highest: float, doc: str) -> Any:
    allowed, read = _number(lowest, highest, " (seconds)", whole=False)
    return field(default=default, metadata={"key": Key(doc, allowed, read)})


def _ratio(default: float, lowest: float, highest: float, doc: str) -> Any:
    allowed, read = _number(lowest, highest, "", whole=False)
    return field(default=default, metadata={"key": Key(doc, allowed, read)})


def _count(default: int, lowest: int, highest: int, doc: str, unit: str = "") -> Any:
    _, read = _number(lowest, highest, unit, whole=True)
    allowed = f"a whole number from {lowest} to {highest}{unit}"
    return field(default=default, metadata={"key": Key(doc, allowed, read)})


def _choice(default: str, choices: tuple[str, ...], doc: str) -> Any:
    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError
        return str(value)

    allowed = "one of " + ", ".join(f'"{choice}"' for choice in choices)
    return field(default=default, metadata={"key": Key(doc, allowed, read)})


def _switch(default: bool, doc: str) -> Any:
    def read(value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value

    return field(default=default, metadata={"key": Key(doc, "true or false", read)})


def _user(doc: str, shown: str) -> Any:
    def read(value: Any) -> str:
        if not isinstance(value, str) or value == "root" or "\0" in value:
            raise ValueError
        return value

    allowed = 'the name of a user other than root, or "" for none'
    key = Key(doc, allowed, read, f"`{shown}`, if there is such a user")
    return field(default=None, metadata={"key": key})


def _path(doc: str, shown: str) -> Any:
    def read(value: Any) -> Path:
        if not isinstance(value, str) or not value or "\0" in value:
            raise ValueError
        return Path(value)

    allowed = "a path, absolute or relative to the directory of this file"
    return field(default=None, metadata={"key": Key(doc, allowed, read, shown)})


def _addresses(doc: str) -> Any:
    def read(value: Any) -> tuple[Address, ...]:
        if not isinstance(value, list) or not value:
            raise ValueError
        found: list[Address] = []
        for index, item in enumerate(value):
            try:
                address = parse_address(item) if isinstance(item, str) else None
            except ValueError:
                address = None
            if address is None:
                raise ValueError(f"item {index + 1}, {_literal(item)}, is not one")
            if address in found and address.port:
                raise ValueError(f"item {index + 1}, {_literal(item)}, stands there twice")
            found.append(address)
        return tuple(found)

    allowed = (
        'a list of at least one "ADDRESS:PORT" with a numeric address and a port from 0 to 65535, '
        'IPv6 in brackets, such as "0.0.0.0:443" or "[::]:443", none of them twice'
    )
    default = tuple(Address(host, port) for port in DEFAULT_PORTS for host in ("0.0.0.0", "::"))
    return field(default=default, metadata={"key": Key(doc, allowed, read)})


# --- the sections --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """[service]: where it listens and where its files are.

    The three paths are never None in what `load` returns: it knows who asks.
    """

    listen: tuple[Address, ...] = _addresses(
        "Where TLS connections are accepted. What the system refuses is reported once; the service "
        "starts if at least one is left. Port 0 lets the system choose; `status` shows which."
    )
    state_dir: Path = _path(
        "What must outlive a restart: database, certificate, journal, crash reports.",
        "`/var/lib/pkvpn`; in User Mode `$XDG_STATE_HOME/pkvpn` or `~/.local/state/pkvpn`",
    )
    runtime_dir: Path = _path(
        "Lock, pid file and sockets. May be emptied while the service is stopped.",
        "`/run/pkvpn`; in User Mode `$XDG_RUNTIME_DIR/pkvpn` or `/tmp/pkvpn-UID`",
    )
    log_file: Path = _path(
        "The log, rotated by size.",
        "`/var/log/pkvpn/pkvpn.log`; in User Mode, or with a `state_dir` of your own, "
        "`pkvpn.log` in the state directory",
    )
    nice: int = _count(
        -10,
        -20,
        19,
        "Priority that is asked for (nice); negative is high. Where the system does not allow it, "
        "the service runs at the priority it was started with.",
    )
    core_user: str | None = _user(
        "As whom the core runs in Service Mode; `core` in the state directory is handed over to "
        "this user. Without one it runs as root, who has no capabilities there.",
        CORE_USER,
    )
    edge_user: str | None = _user(
        "As whom the edges and the canary run in Service Mode.", EDGE_USER
    )
    sandbox: bool = _switch(
        True,
        "Whether the children are held to what they need by the kernel, where it can: files by "
        "Landlock, calls by seccomp. `status` shows what is in force. `start --no-sandbox` turns "
        "it off for once, to find out why something fails.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Watchdog:
    """[watchdog]: deadlines, restart policy and evidence."""

    beat_interval: float = _seconds(
        0.2, 0.01, 60.0, "How often a child tells that its loop turns, and what it got done."
    )
    hang_timeout: float = _seconds(
        1.0,
        0.05,
        600.0,
        "Silence after which a child is examined and, if it is to blame, replaced. "
        "At least three times `beat_interval`.",
    )
    start_timeout: float = _seconds(
        10.0,
        0.5,
        600.0,
        "How long a child may take until it serves. Not less than `hang_timeout`.",
    )
    stop_timeout: float = _seconds(
        5.0, 0.1, 600.0, "How long a child may take to end when asked; then it is killed."
    )
    stopped_timeout: float = _seconds(
        10.0,
        0.1,
        3600.0,
        "How long a child may stay stopped (SIGSTOP) although it was continued once; then it is "
        "replaced. Not less than `hang_timeout`.",
    )
    deaf_timeout: float = _seconds(
        3.0,
        0.1,
        600.0,
        "How long something may wait for a child that beats but gets nothing of it done. "
        "Not less than `hang_timeout`.",
    )
    backoff_first: float = _seconds(
        0.05,
        0.001,
        600.0,
        "Delay of the second restart in a row; the first one comes at once.",
    )
    backoff_factor: float = _ratio(2.0, 1.0, 10.0, "What each further delay is multiplied with.")
    backoff_cap: float = _seconds(
        5.0, 0.001, 3600.0, "The longest delay. Not less than `backoff_first`."
    )
    backoff_jitter: float = _ratio(
        0.1, 0.0, 1.0, "The part of a delay that is left to chance, so that children do not march."
    )
    healthy_after: float = _seconds(
        0.5, 0.0, 86400.0, "After this time of service the next restart comes at once again."
    )
    intensity: int = _count(
        5,
        1,
        10000,
        "More deaths of one child before it was healthy than this, within `period`, are too many.",
    )
    period: float = _seconds(60.0, 0.1, 86400.0, "The window of `intensity`.")
    on_limit: str = _choice(
        "go-on",
        ("go-on", "give-up"),
        "What too many restarts lead to: go on with `backoff_cap` between two of them and report "
        "the child as `failing`, or stop the service with an exit code of its own.",
    )
    standby: bool = _switch(
        True,
        "Whether a successor of the core and of each edge is forked ahead and waits: a dead one is "
        "then replaced in half the time, for some MB of memory each.",
    )
    given_max: int = _count(
        12000,
        16,
        1000000,
        "How many descriptors (connections) a child may leave in the care of the watchdog. "
        "The limit of open files lowers it further.",
    )
    crash_reports_max: int = _count(50, 1, 10000, "How many crash reports are kept.")
    crash_reports_max_bytes: int = _count(
        5242880, 65536, 1073741824, "How much room they may take together.", " (bytes)"
    )
    journal_max_bytes: int = _count(
        1048576, 4096, 1073741824, "Size at which a file of the journal is closed.", " (bytes)"
    )
    journal_keep: int = _count(5, 1, 1000, "How many closed files of the journal are kept.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """[edge]: the processes that hold the connections."""

    processes: int = _count(
        0,
        0,
        64,
        "How many edge processes; 0 is automatic: one on up to two processors, else half as many "
        "as there are processors.",
    )
    certificate: Path | None = _path(
        "PEM file with the server's certificate and its chain. Only together with `key`.",
        "a self-signed certificate made at the first start, in the state directory",
    )
    key: Path | None = _path("PEM file with the certificate's private key.", "see `certificate`")
    connections_max: int = _count(
        10000, 1, 100000, "How many connections one edge process accepts at a time."
    )
    connections_per_address: int = _count(
        0, 0, 100000, "How many of them may come from one address; 0 is no limit."
    )
    memory_max: int = _count(
        0,
        0,
        1 << 40,
        "How much memory one edge process may use for what its connections have not taken or sent "
        "yet. Above it nobody new is let in, and clients that do not read lose frames sooner. "
        "0 is automatic: a quarter of the machine's (or the control group's) for all edges.",
        " (bytes)",
    )
    login_timeout: float = _seconds(
        30.0, 1.0, 600.0, "How long a connection may take from accept to login."
    )
    idle_timeout: float = _seconds(
        60.0,
        5.0,
        3600.0,
        "How long a logged-in connection may be silent. It is told to the clients, which send "
        "keep-alives accordingly and, cut off, try to come back for as long.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """[canary]: the client of our own that proves that the service answers."""

    interval: float = _seconds(
        5.0, 0.05, 3600.0, "From one login of the canary to the next, at the next address."
    )
    timeout: float = _seconds(
        2.0,
        0.1,
        600.0,
        "Time after which an unanswered login means that the service is deaf. It is tried twice, "
        "each for half of it.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """[log]: what is logged and how."""

    level: str = _choice(
        "info", ("debug", "info", "warning", "error"), "The least important level that is logged."
    )
    format: str = _choice(
        "auto",
        ("auto", "plain", "json", "journal"),
        "`plain` lines, one `json` object a line, or lines with a `journal` priority in front. "
        "`auto`: coloured on a terminal, `journal` under systemd, else plain. Files are plain "
        "unless this says `json`.",
    )
    max_bytes: int = _count(
        10485760, 4096, 1073741824, "Size at which the log file is rotated.", " (bytes)"
    )
    keep: int = _count(5, 1, 1000, "How many rotated log files are kept.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The effective configuration: file over defaults, all paths absolute, all relations checked.

    `mode` is "service" (root) or "user"; `source` the absolute path of the file, if there is one.
    """

    mode: str
    source: Path | None
    service: Service
    watchdog: Watchdog
    edge: Edge
    canary: Canary
    log: Log

    @property
    def control_socket(self) -> Path:
        return self.service.runtime_dir / "control.sock"

    @property
    def admin_socket(self) -> Path:
        return self.service.runtime_dir / "admin.sock"

    @property
    def certificate_files(self) -> tuple[Path, Path]:
        """The certificate and its key; those that are made if there are none."""
        state = self.service.state_dir
        return self.edge.certificate or state / "server.crt", self.edge.key or state / "server.key"

    @property
    def core_dir(self) -> Path:
        """What belongs to the core alone: the database and the secret of the session keys."""
        return self.service.state_dir / "core"

    @property
    def lock_file(self) -> Path:
        return self.service.runtime_dir / "lock"

    @property
    def pid_file(self) -> Path:
        return self.service.runtime_dir / "pid"

    @property
    def crashes_dir(self) -> Path:
        return self.service.state_dir / "crashes"

    def edge_processes(self, processors: int) -> int:
        """How many edges to start on a machine with so many processors."""
        if self.edge.processes:
            return self.edge.processes
        return max(1, processors // 2) if processors > 2 else 1


SECTIONS: Mapping[str, type[Any]] = {
    "service": Service,
    "watchdog": Watchdog,
    "edge": Edge,
    "canary": Canary,
    "log": Log,
}


def keys_of(section: type[Any]) -> Iterator[tuple[Field[Any], Key]]:
    for entry in fields(section):
        yield entry, entry.metadata["key"]


# --- reading -------------------------------------------------------------------------------------

_T = TypeVar("_T")


class _File:
    """A TOML file's text, and where in it a key stands (tomllib does not tell)."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self._lines = text.splitlines()

    def at(self, section: str, key: str | None = None) -> str:
        """Return "file:line" of a key, of its section if it has no line of its own, or "file:1"."""
        current, fallback = "", 0
        for number, line in enumerate(self._lines, 1):
            # The dots of a dotted key stay; blanks and quotes around its parts do not matter.
            left = "".join(line.split("#", 1)[0].partition("=")[0].split()).replace('"', "")
            left = left.replace("'", "")
            if left.startswith("["):
                current = left.strip("[]")
                if current == section:
                    fallback = fallback or number
                if key is not None and current == f"{section}.{key}":
                    return f"{self.name}:{number}"
                continue
            if "=" not in line:
                continue
            whole = f"{current}.{left}" if current else left
            if key is not None and (whole + ".").startswith(f"{section}.{key}."):
                return f"{self.name}:{number}"
            if (whole + ".").startswith(section + "."):
                fallback = fallback or number
        return f"{self.name}:{fallback or 1}"


def load(
    path: str | os.PathLike[str] | None,
    *,
    environ: Mapping[str, str] | None = None,
    uid: int | None = None,
) -> Settings:
    """Read the configuration, or only the defaults if there is no file.

    Raises ConfigError with everything that is wrong.  `environ` and `uid` are those of this process
    unless given.
    """
    environ = os.environ if environ is None else environ
    uid = os.geteuid() if uid is None else uid
    if path is None:
        return _settled({}, None, None, environ, uid)
    source = Path(os.path.abspath(path))
    try:
        text = source.read_bytes().decode("utf-8")
        tables = tomllib.loads(text)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not UTF-8 at byte {error.start}"]) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_syntax_error(str(path), str(error))]) from None
    return _settled(tables, _File(str(path), text), source, environ, uid)


def _syntax_error(name: str, text: str) -> str:
    """Turn tomllib's "... (at line 3, column 5)" into "file:3: ... (column 5)"."""
    what, _, place = text.partition(" (at line ")
    line, _, rest = place.rstrip(")").partition(", ")
    return f"{name}:{line}: not valid TOML: {what} ({rest})" if rest else f"{name}: {text}"


def _settled(
    tables: Mapping[str, Any],
    file: _File | None,
    source: Path | None,
    environ: Mapping[str, str],
    uid: int,
) -> Settings:
    errors: list[str] = []
    for name, table in tables.items():
        if name not in SECTIONS:
            assert file is not None
            what = f"[{name}]" if isinstance(table, dict) else f"{name} = {_literal(table)}"
            errors.append(
                f"{file.at(name)}: {what}: there is no such section"
                f"{_did_you_mean(name, SECTIONS)}; allowed are "
                + ", ".join(f"[{section}]" for section in SECTIONS)
            )

    def section(kind: type[_T]) -> _T:
        return _read_section(kind, tables, file, source, errors)

    settings = Settings(
        mode="service" if uid == 0 else "user",
        source=source,
        service=section(Service),
        watchdog=section(Watchdog),
        edge=section(Edge),
        canary=section(Canary),
        log=section(Log),
    )
    settings = replace(settings, service=_with_directories(settings.service, environ, uid))
    # Beside a value that was refused and stands at its default, a broken relation means nothing.
    refused = [] if errors else list(_broken_relations(settings))
    for name, key, why in refused:
        value = getattr(getattr(settings, name), key)
        where = file.at(name, key) if file is not None else "the defaults"
        errors.append(f"{where}: [{name}] {key} = {_literal(value)}: {why}")
    if errors:
        raise ConfigError(errors)
    return settings


def _read_section(
    kind: type[_T],
    tables: Mapping[str, Any],
    file: _File | None,
    source: Path | None,
    errors: list[str],
) -> _T:
    """Make one section; what is wrong goes to `errors`, and the default stands in for it."""
    name = kind.__name__.lower()
    table = tables.get(name)
    if file is None or table is None:
        return kind()
    if not isinstance(table, dict):
        errors.append(
            f"{file.at(name)}: {name} = {_literal(table)}: allowed is a section, [{name}]"
        )
        return kind()
    known = {entry.name: key for entry, key in keys_of(kind)}
    values: dict[str, Any] = {}
    for entry, value in table.items():
        where = file.at(name, entry)
        key = known.get(entry)
        if key is None:
            errors.append(
                f"{where}: [{name}] {entry} = {_literal(value)}: there is no such key"
                f"{_did_you_mean(entry, known)}; allowed are " + ", ".join(known)
            )
            continue
        try:
            read = key.read(value)
        except ValueError as error:
            part = f" ({error})" if str(error) else ""
            errors.append(
                f"{where}: [{name}] {entry} = {_literal(value)}: allowed is {key.allowed}{part}"
            )
            continue
        if isinstance(read, Path) and source is not None:
            # Lexical, so that a path may stand for something that is not there yet.
            read = Path(os.path.normpath(source.parent / read))
        values[entry] = read
    return kind(**values)


def _did_you_mean(word: str, known: Mapping[str, Any]) -> str:
    import difflib  # only here: nothing is wrong most of the time

    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]}?" if close else ""


def _with_directories(service: Service, environ: Mapping[str, str], uid: int) -> Service:
    """Fill in the paths that depend on who runs us (systemd's file-hierarchy(7), XDG)."""

    def xdg(name: str) -> Path | None:
        # The XDG specification: a relative path is to be ignored.
        value = environ.get(name, "")
        return Path(value) / "pkvpn" if value.startswith("/") else None

    root = uid == 0
    state: Path | None = service.state_dir
    log: Path | None = service.log_file
    if log is None and state is None and root:
        log = Path("/var/log/pkvpn/pkvpn.log")
    if state is None and root:
        state = Path("/var/lib/pkvpn")
    elif state is None:
        state = xdg("XDG_STATE_HOME") or _home(environ, uid) / ".local/state/pkvpn"
    runtime: Path | None = service.runtime_dir
    if runtime is None and root:
        runtime = Path("/run/pkvpn")
    elif runtime is None:
        runtime = xdg("XDG_RUNTIME_DIR") or Path(f"/tmp/pkvpn-{uid}")  # noqa: S108 - checked below
    return replace(
        service, state_dir=state, runtime_dir=runtime, log_file=log or state / "pkvpn.log"
    )


def _home(environ: Mapping[str, str], uid: int) -> Path:
    home = environ.get("HOME", "")
    if home.startswith("/"):
        return Path(home)
    import pwd  # HOME is unset in cron jobs and bare containers

    try:
        return Path(pwd.getpwuid(uid).pw_dir)
    except KeyError:
        return Path("/")


def _broken_relations(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """Yield (section, key, why) for every rule between two keys that does not hold."""
    watchdog, edge = settings.watchdog, settings.edge
    if watchdog.hang_timeout < 3 * watchdog.beat_interval:
        yield (
            "watchdog",
            "hang_timeout",
            (
                f"allowed is at least 3 * beat_interval, here {3 * watchdog.beat_interval:g}: "
                "a single late beat must not look like a hang"
            ),
        )
    for key in ("start_timeout", "stopped_timeout", "deaf_timeout"):
        if getattr(watchdog, key) < watchdog.hang_timeout:
            yield "watchdog", key, f"allowed is at least hang_timeout, {watchdog.hang_timeout:g}"
    if watchdog.backoff_cap < watchdog.backoff_first:
        yield (
            "watchdog",
            "backoff_cap",
            f"allowed is at least backoff_first, {watchdog.backoff_first:g}",
        )
    if (edge.certificate is None) != (edge.key is None):
        given, missing = ("certificate", "key") if edge.key is None else ("key", "certificate")
        yield "edge", given, f"allowed only together with {missing}, which is not set"
    length = len(os.fsencode(settings.control_socket))
    if length > SOCKET_PATH_MAX:
        yield (
            "service",
            "runtime_dir",
            (
                f"{settings.control_socket} has {length} bytes; allowed are {SOCKET_PATH_MAX}, "
                "the system's limit for the path of a socket"
            ),
        )


# --- directories ---------------------------------------------------------------------------------


def check_runtime_dir(settings: Settings) -> None:
    """Refuse a runtime directory that somebody else could have put there.

    To be called before a socket or a pid in it is believed.  A directory that is not there is fine.
    Raises ConfigError.
    """
    # Root may look at the service of another user.
    owners = {os.geteuid(), 0}
    _check_directory(settings.service.runtime_dir, "runtime_dir", owners if os.geteuid() else None)


def _check_directory(path: Path, key: str, owners: set[int] | None) -> None:
    """``owners``: who may own it; None: anybody."""
    try:
        found = os.lstat(path)
        if key == "state_dir" and stat.S_ISLNK(found.st_mode):
            found = os.stat(path)  # an operator's way to another disk
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError([f"{path}: cannot be examined: {error.strerror}"]) from None
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError([f"{path}: is not a directory; set [service] {key} to one"])
    if owners is not None and found.st_uid not in owners:
        raise ConfigError(
            [f"{path}: belongs to user {found.st_uid}, not to us; set [service] {key}"]
        )
    others = 0o002 if found.st_gid in (os.getegid(), 0) else 0o022
    if found.st_mode & others:
        raise ConfigError(
            [
                (
                    f"{path}: others may write to it (mode {stat.S_IMODE(found.st_mode):04o}); "
                    "only the user of the service may"
                )
            ]
        )


def make_directories(settings: Settings) -> None:
    """Make the directories of the service where they are missing.

    What is made is for this user only (0700), except the directory of the log, which administrators
    may read (0755).  Raises ConfigError.
    """
    service = settings.service
    for path, mode in (
        (service.state_dir, 0o700),
        (service.runtime_dir, 0o700),
        (service.log_file.parent, 0o755),
    ):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=mode, exist_ok=True)
        except OSError as error:
            raise ConfigError([f"{path}: cannot be made: {error.strerror}"]) from None
    check_runtime_dir(settings)
    # What we made in another's would not be his, and what he put there is not to be believed.
    _check_directory(service.state_dir, "state_dir", {os.geteuid()})
    _make_core_dir(settings)


def _make_core_dir(settings: Settings) -> None:
    """Before the core had a directory of its own its files lay in the state directory: move them.

    The database last: while it is at its old place, the rest is looked for as well.
    """
    try:
        settings.core_dir.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"{settings.core_dir}: cannot be made: {error.strerror}"]) from None
    for name in ("session.key", "pkvpn.db-shm", "pkvpn.db-wal", "pkvpn.db"):
        old, new = settings.service.state_dir / name, settings.core_dir / name
        try:
            if old.exists() and not new.exists():
                old.rename(new)
        except OSError as error:
            raise ConfigError([f"{old}: cannot be moved to {new}: {error.strerror}"]) from None


# --- writing -------------------------------------------------------------------------------------


def _literal(value: Any) -> str:
    """Write a value as TOML would have it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple) and not isinstance(value, Address):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str | Path | Address):
        import json

        # JSON's escapes are a part of TOML's, which also wants DEL escaped.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)  # dates and times: isoformat is TOML


def to_toml(settings: Settings) -> str:
    """Write the effective configuration as a file that `load` reads back to the same."""
    lines: list[str] = []
    for name, kind in SECTIONS.items():
        lines.append(f"[{name}]")
        for entry, _ in keys_of(kind):
            value = getattr(getattr(settings, name), entry.name)
            if value is None:
                lines.append(f"# {entry.name} is not set")
            else:
                lines.append(f"{entry.name} = {_literal(value)}")
        lines.append("")
    return "\n".join(lines)


_PREFACE = """\
# Configuration

<!-- Made by `python -m pkvpn config defaults`; a test compares. Change pkvpn/config.py instead. -->

The file is TOML. Name it with `--config FILE` before the verb, or in `PKVPN_CONFIG`; without one,
the defaults below hold. `python -m pkvpn config show` prints what is in effect. An unknown key or
a value that is not allowed is an error that names file, line, key, value and what is allowed.
Times are seconds. Service Mode means started by root, User Mode by anybody else.
"""


def defaults_document() -> str:
    """Write every key with its default, its limits and its sentence, as Markdown."""
    lines = [_PREFACE, "| section | key | default | allowed | meaning |", "| --- " * 5 + "|"]
    for name, kind in SECTIONS.items():
        for entry, key in keys_of(kind):
            default = key.shown or f"`{_literal(entry.default)}`"
            cells = (f"`[{name}]`", f"`{entry.name}`", default, key.allowed, key.doc)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
