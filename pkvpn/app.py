"""The VPN server as child specs: the only file that knows watchdog, core and edge.

Strategy: settings in, a `TreeSpec` out.  What must outlive a child is opened here, in the
watchdog, and handed down by name; everything else is the children's own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import socket
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pkvpn import __version__, logs
from pkvpn.cli import complain
from pkvpn.client.canary_main import REACH_CORE, REACH_EDGE, TRIES, CanarySettings
from pkvpn.client.canary_main import main as canary_main
from pkvpn.config import CORE_USER, EDGE_USER, ConfigError, Settings, load, make_directories
from pkvpn.core.main import main as core_main
from pkvpn.core.settings import CoreSettings
from pkvpn.core.store import StoreError, read_bridges
from pkvpn.edge.main import EdgeSettings
from pkvpn.edge.main import main as edge_main
from pkvpn.keyholder import KeyHolder
from pkvpn.listeners import Listeners
from pkvpn.taps import Taps
from pkvpn.users import UserError, acting_as_owner, find_user, hand_over, let_through
from pkvpn.watchdog import control
from pkvpn.watchdog.confinement import NO_CORE, Confinement, Files, Network, User
from pkvpn.watchdog.logchild import LogSettings
from pkvpn.watchdog.policy import OnLimit, RestartPolicy
from pkvpn.watchdog.run import run_tree
from pkvpn.watchdog.spec import ChildSpec, HeldSpec, TreeSpec, Upgrade
from pkvpn.watchdog.supervisor import EXIT_START_FAILED
from pkvpn.watchdog.upgrade import is_copy
from pkvpn.watchdog.witness import Accuses

TITLE = "vpnserver execsvc"
COMM = "vpnserver"

# What the watchdog needs, of what root may: to bind low ports and open TAPs, also at a reload; to
# make children of other users, to see how they are and to end them; to read and write files that
# may be anybody's; to set priorities, limits and large buffers.
_WATCHDOG_KEEPS = (
    "net_bind_service", "net_admin", "setuid", "setgid", "setpcap", "kill", "sys_ptrace",
    "dac_override", "dac_read_search", "chown", "fowner", "sys_nice", "sys_resource",
)  # fmt: skip
# Where memory is short the canary goes first and the watchdog last (proc(5), oom_score_adj).
_WATCHDOG_OOM, _CANARY_OOM = -900, 500
# Of a database that has run wild, in bytes; and open files of children that hold no connections.
_CORE_FILE_MAX = 4 << 30
_FEW_FILES = 1024

# Room for what is queued in a channel while a core or an edge is being replaced.  The kernel
# cuts it to net.core.wmem_max.
_CHANNEL_BUFFER = 4 << 20
_CANARY_SECRET = 32


# Children import late what they seldom need, and tracebacks show lines of it; and the database
# library wants random numbers.
_CODE = (
    *dict.fromkeys(map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib"))),
    os.path.dirname(os.path.abspath(__file__)),
    "/dev/urandom",
    os.devnull,
)  # fmt: skip


class Users(NamedTuple):
    """As whom the children run; None: as the watchdog does."""

    core: User | None = None
    edge: User | None = None


def find_users(settings: Settings) -> Users:
    """In Service Mode those of the settings, or the usual ones if they are there.

    Raises UserError for one that the settings name and that is not there.
    """
    if settings.mode != "service":
        return Users()
    found = []
    for key, usual in (("core_user", CORE_USER), ("edge_user", EDGE_USER)):
        named = getattr(settings.service, key)
        user = None if named == "" else find_user(named or usual)
        if named and user is None:
            raise UserError(f'[service] {key} = "{named}": there is no such user')
        found.append(user)
    return Users(*found)


class Service:
    """Holds what outlives a change of settings, and makes the tree's spec of each."""

    def __init__(
        self,
        settings: Settings,
        *,
        foreground: bool,
        sandbox: bool = True,
        tell: Callable[[dict[str, Any]], None] = lambda _line: None,
    ) -> None:
        """``sandbox`` False: whatever the settings say, there is none."""
        self.settings = settings
        self._keys = KeyHolder(tell)
        self._users = Users()
        self._foreground = foreground
        self._sandbox = sandbox
        self.listeners = Listeners()
        self._taps = Taps()
        self._channels: list[tuple[list[int], list[int]]] = []  # per edge: its ends, the core's

    def tree(self, settings: Settings) -> TreeSpec:
        """The spec for these settings.  Raises StoreError if the database cannot be read."""
        users = find_users(settings)
        with acting_as_owner(settings.core_dir):
            records = read_bridges(str(settings.core_dir))
        bridges = self._taps.held(records)
        self.settings, self._users = settings, users
        edges = [f"edge-{i + 1}" for i in range(settings.edge_processes(os.cpu_count() or 1))]
        return TreeSpec(
            name="pkvpn",
            title=TITLE,
            comm=COMM,
            runtime_dir=str(settings.service.runtime_dir),
            state_dir=str(settings.service.state_dir),
            beat_interval=settings.watchdog.beat_interval,
            nice=settings.service.nice,
            oom_score_adj=_WATCHDOG_OOM,
            capabilities=_WATCHDOG_KEEPS,
            held=(*self._held(edges), *bridges),
            children=tuple(self._children(edges, tuple(held.name for held in bridges))),
            log=self._log(),
            # It makes its directories again when somebody has removed them, wherever they are.
            log_confinement=self._confined(Network.NONE, capabilities=("dac_override",)),
            upgrade=self._upgrade(),
        )

    def status(self) -> dict[str, Any]:
        return {
            "version": __version__,  # of the program that runs, which may not be the installed one
            "mode": self.settings.mode,
            "listeners": self.listeners.status(),
        }

    def _upgrade(self) -> Upgrade:
        source = self.settings.source
        config = ("--config", str(source)) if source is not None else ()
        return Upgrade(
            package="pkvpn",
            main="pkvpn.__main__:main",
            arguments=(*config, "execsvc", *(() if self._sandbox else ("--no-sandbox",))),
            trial=(sys.executable, "-m", "pkvpn", *config, "execsvc", "--check"),
        )

    # -- what is held

    def _held(self, edges: list[str]) -> list[HeldSpec]:
        service = self.settings.service
        admin = str(self.settings.admin_socket)
        held = [
            self._keys.held(self.settings.certificate_files),
            HeldSpec(
                "listen",
                lambda: self.listeners.open(service.listen),
                key=service.listen,
                adopt=lambda descriptors: self.listeners.adopt(service.listen, descriptors),
                stored=True,
            ),
            HeldSpec(
                "admin",
                lambda: [control.listen(admin)],
                key=admin,
                name_in_runtime_dir=self.settings.admin_socket.name,
            ),
            HeldSpec("canary", _canary_secret),
            HeldSpec("channel:core", lambda: self._core_ends(len(edges)), key=len(edges)),
        ]
        for index, name in enumerate(edges):
            held.append(HeldSpec(f"channel:{name}", lambda index=index: self._edge_ends(index)))  # type: ignore[misc]
            held.append(self._checkpoint(name))
        return held

    def _checkpoint(self, name: str) -> HeldSpec:
        kept: list[int] = []

        def make() -> list[int]:
            if kept:
                return [os.dup(kept.pop())]
            return [os.memfd_create(f"checkpoint-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)]

        return HeldSpec(f"checkpoint:{name}", make, adopt=kept.extend, stored=True)

    def _core_ends(self, edges: int) -> list[int]:
        while len(self._channels) < edges:
            pairs = [_channel_pair() for _ in ("control", "frames")]
            self._channels.append(([pair[0] for pair in pairs], [pair[1] for pair in pairs]))
        return [fd for _, core_ends in self._channels[:edges] for fd in core_ends]

    def _edge_ends(self, index: int) -> list[int]:
        return self._channels[index][0]

    # -- who runs

    def _children(self, edges: list[str], bridges: tuple[str, ...]) -> list[ChildSpec]:
        return [
            self._core(bridges),
            *(self._edge(i, name, len(edges)) for i, name in enumerate(edges)),
            self._canary(edges),
        ]

    def _core(self, bridges: tuple[str, ...]) -> ChildSpec:
        settings = CoreSettings(
            state_dir=str(self.settings.core_dir),
            session_timeout=self.settings.edge.idle_timeout,
            refused_bridges=self._taps.refused,
        )
        return self._child(
            "core", core_main, settings,
            held=("channel:core", "admin", "canary", *bridges), duties=("switch", "login", "store"),
            keep_limit=1,  # what it was working on when it died
            confinement=self._confined(
                Network.UNTIL_TURN, self._users.core, CORE_USER,
                limits=(("fsize", _CORE_FILE_MAX), ("nofile", _FEW_FILES)),
                files=Files(_CODE, (str(self.settings.core_dir),)),
            ),
            standby=self.settings.watchdog.standby,
        )  # fmt: skip

    def _edge(self, index: int, name: str, edges: int) -> ChildSpec:
        edge = self.settings.edge
        settings = EdgeSettings(
            index=index + 1,
            max_connections=edge.connections_max,
            max_per_address=edge.connections_per_address,
            login_timeout=edge.login_timeout,
            memory_max=edge.memory_max or _memory() // 4 // edges,
        )
        return self._child(
            name, edge_main, settings,
            held=("listen", "certificate", f"channel:{name}", f"checkpoint:{name}"),
            duties=("accept", "login", "forward", "hear", "look"),
            # What waits there waits for the core's answer.
            accuses=(
                Accuses(
                    "login", ("core",), self.settings.watchdog.deaf_timeout,
                    excused_by=("login",), looks="look",
                ),
            ),
            keep_limit=self.settings.watchdog.given_max, standby=self.settings.watchdog.standby,
            confinement=self._confined(
                Network.UNTIL_TURN, self._users.edge, EDGE_USER, files=Files(_CODE)
            ),
        )  # fmt: skip

    def _canary(self, edges: list[str]) -> ChildSpec:
        settings = CanarySettings(
            addresses=self.listeners.addresses,
            interval=self.settings.canary.interval,
            timeout=self.settings.canary.timeout,
        )
        return self._child(
            "canary", canary_main, settings, held=("canary",), duties=(REACH_EDGE, REACH_CORE),
            oom_score_adj=_CANARY_OOM,
            confinement=self._confined(
                Network.FREE, self._users.edge, EDGE_USER,
                limits=(("nofile", _FEW_FILES),), files=Files(_CODE),
            ),
            accuses=(
                Accuses(REACH_EDGE, tuple(edges), times=TRIES, excused_by=("accept", "login")),
                Accuses(REACH_CORE, ("core",), times=TRIES, excused_by=("login",)),
            ),
            vital=False,
        )  # fmt: skip

    def _child(
        self, name: str, target: Callable[..., None], settings: Any, **more: Any
    ) -> ChildSpec:
        watchdog = self.settings.watchdog
        return ChildSpec(
            name,
            target,
            settings,
            start_timeout=watchdog.start_timeout,
            hang_timeout=watchdog.hang_timeout,
            stop_timeout=watchdog.stop_timeout,
            stopped_timeout=watchdog.stopped_timeout,
            deaf_timeout=watchdog.deaf_timeout,
            policy=RestartPolicy(
                first=watchdog.backoff_first,
                factor=watchdog.backoff_factor,
                cap=watchdog.backoff_cap,
                jitter=watchdog.backoff_jitter,
                healthy_after=watchdog.healthy_after,
                intensity=watchdog.intensity,
                period=watchdog.period,
                on_limit=OnLimit(watchdog.on_limit),
            ),
            **more,
        )

    def _confined(
        self,
        network: Network,
        user: User | None = None,
        default_user: str = "",
        *,
        capabilities: tuple[str, ...] = (),
        limits: tuple[tuple[str, int], ...] = (),
        files: Files | None = None,
    ) -> Confinement:
        sandbox = self._sandbox and self.settings.service.sandbox
        missing = default_user and user is None and self.settings.mode == "service"
        return Confinement(
            user=user,
            why_no_user=f"{default_user} is not there, or not wanted" if missing else "",
            capabilities=capabilities,
            limits=(NO_CORE, *limits),
            files=files if sandbox else None,
            calls=sandbox,
            network=network,
        )

    def _log(self) -> LogSettings:
        service, watchdog, log = self.settings.service, self.settings.watchdog, self.settings.log
        # Under systemd stderr is the journal, and the file would be a second copy of it.
        to_journal = log.format == "journal" or (
            log.format == "auto" and logs.is_journal(sys.stderr)
        )
        return LogSettings(
            state_dir=str(service.state_dir),
            log_file=None if to_journal else str(service.log_file),
            echo=self._foreground,
            formatter=LineFormat(log.format, to_file=True),
            echo_formatter=LineFormat(log.format, to_file=False),
            log_max_bytes=log.max_bytes,
            log_keep=log.keep,
            journal_max_bytes=watchdog.journal_max_bytes,
            journal_keep=watchdog.journal_keep,
            max_reports=watchdog.crash_reports_max,
            max_reports_bytes=watchdog.crash_reports_max_bytes,
        )


@dataclass(frozen=True)
class LineFormat:
    """How log lines look; equal to another of the same choice, so that a reload compares it."""

    kind: str
    to_file: bool

    def __call__(self, record: logging.LogRecord) -> str:
        return _formatter(self).format(record)


@functools.cache
def _formatter(choice: LineFormat) -> logging.Formatter:
    return logs.make_formatter(choice.kind, None if choice.to_file else sys.stderr)


def execsvc(
    settings: Settings,
    *,
    ready_fd: int | None = None,
    foreground: bool = False,
    check: bool = False,
    resume_fd: int | None = None,
    no_sandbox: bool = False,
) -> int:
    """Be the watchdog of the VPN server; returns the exit code.

    ``ready_fd``: where `start` waits for JSON lines, one for each thing it is told.
    ``check``: only see whether this program and these settings would start.
    ``resume_fd``: the table of the image before an upgrade.
    ``no_sandbox``: see `Service`.
    """
    tell = _teller(ready_fd) if ready_fd is not None else _print_start
    service = Service(settings, foreground=foreground, sandbox=not no_sandbox, tell=tell)
    try:
        if check:
            service.tree(settings)
            return 0
        os.umask(0o077)
        prepare_directories(settings)
        spec = service.tree(settings)
        if resume_fd is None:
            _tell_missing_users(settings, tell)
        _leave_directory()
        logging.getLogger().setLevel(settings.log.level.upper())
        return run_tree(
            spec,
            tell=tell,
            on_reload=lambda: service.tree(load(settings.source)),
            status=service.status,
            resume_fd=resume_fd,
        )
    except (ConfigError, StoreError, OSError) as error:
        tell({"error": str(error), "code": EXIT_START_FAILED})
        return EXIT_START_FAILED


def _tell_missing_users(settings: Settings, tell: Callable[[dict[str, Any]], None]) -> None:
    names = " and ".join(
        usual
        for usual, named, user in zip(
            (CORE_USER, EDGE_USER),
            (settings.service.core_user, settings.service.edge_user),
            find_users(settings),
            strict=True,
        )
        if named is None and user is None
    )
    if names and settings.mode == "service":
        tell({"progress": f"there is no user {names}: what should run as one runs as root, "
                          "without its capabilities; `install` makes them"})  # fmt: skip


def prepare_directories(settings: Settings) -> None:
    """Make them, and hand to the core what is the core's.  Raises ConfigError, OSError."""
    make_directories(settings)
    if settings.mode == "service":
        user = find_users(settings).core
        let_through(settings.service.state_dir, user)
        hand_over(settings.core_dir, user)


def _leave_directory() -> None:
    """From here on the current directory is nobody's; a package that was found through it (a
    checkout) must still be found, also by the programs an upgrade starts."""
    sys.path[:] = [os.path.abspath(path) for path in sys.path]
    if not is_copy("pkvpn"):
        home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        known = os.environ.get("PYTHONPATH", "")
        if home not in known.split(os.pathsep):
            os.environ["PYTHONPATH"] = os.pathsep.join(path for path in (home, known) if path)
    os.chdir("/")


def _teller(fd: int) -> Callable[[dict[str, Any]], None]:
    """Tell `start`, until it knows how it went; it may have gone away."""
    os.set_inheritable(fd, False)
    os.set_blocking(fd, False)

    def tell(line: dict[str, Any]) -> None:
        nonlocal fd
        if fd < 0:
            return
        with contextlib.suppress(OSError):
            os.write(fd, json.dumps(line).encode() + b"\n")
        if "progress" not in line:
            os.close(fd)
            fd = -1

    return tell


def _print_start(line: dict[str, Any]) -> None:
    """In the foreground the terminal is who waits for the start, if there is one."""
    if sys.stderr is None:
        return
    if "error" in line:
        complain(line["error"])
    elif "already" in line:
        sys.stderr.write(f"vpnserver: the service is already running (pid {line['already']})\n")
    elif line.get("ready"):
        for one in line["listeners"]:
            if one["state"] == "refused":
                sys.stderr.write(f"vpnserver: {one['address']}:{one['port']}: {one['error']}\n")
        sys.stderr.write("PacketiX VPN Server Service Started.\n")


def _channel_pair() -> tuple[int, int]:
    ends = socket.socketpair(
        socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    )
    for end in ends:
        for force, plain in ((32, socket.SO_SNDBUF), (33, socket.SO_RCVBUF)):  # SO_*BUFFORCE
            try:
                end.setsockopt(socket.SOL_SOCKET, force, _CHANNEL_BUFFER)
            except OSError:
                end.setsockopt(socket.SOL_SOCKET, plain, _CHANNEL_BUFFER)
    return ends[0].detach(), ends[1].detach()


def _canary_secret() -> list[int]:
    """A password only the core and the canary can read; the watchdog forgets it at once."""
    fd = os.memfd_create("canary", os.MFD_CLOEXEC)
    os.write(fd, os.urandom(_CANARY_SECRET))
    return [fd]


def _memory() -> int:
    """Of the machine, or what the control groups leave of it, in bytes."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):
        # cgroups(7): the line of version 2 is "0::/path".
        text = Path("/proc/self/cgroup").read_text(encoding="utf-8")
        path = next((line[3:] for line in text.splitlines() if line.startswith("0::")), "/")
        group = Path("/sys/fs/cgroup") / path.lstrip("/")
        for one in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # "max": no limit
                limits.append(int((one / "memory.max").read_text(encoding="ascii")))
    return min(limits)
