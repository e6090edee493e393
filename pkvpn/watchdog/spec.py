"""What a daemon author writes down: the children of a tree, and what is held for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from pkvpn.watchdog.confinement import Confinement
from pkvpn.watchdog.lifeline import MAX_DUTIES
from pkvpn.watchdog.policy import RestartPolicy
from pkvpn.watchdog.witness import Accuses

# The child that the framework itself adds: it alone writes to disk.
LOG_CHILD = "log"


class Restart(Enum):
    """Which ends of a child are followed by a new one."""

    PERMANENT = "permanent"  # every end that nobody asked for
    TRANSIENT = "transient"  # crashes; not an exit with 0
    TEMPORARY = "temporary"  # none


@dataclass(frozen=True)
class ChildSpec:
    """One child.  Times in seconds.

    ``target(child, settings)`` runs in the child and returns when ``child.stopping``; without
    settings it is called ``target(child)``.  Two specs that are equal are the same child: a
    reload replaces a child whose spec has changed.
    """

    name: str
    target: Callable[..., None]
    settings: Any = None
    restart: Restart = Restart.PERMANENT
    start_timeout: float = 10.0
    hang_timeout: float = 1.0
    stop_timeout: float = 5.0
    stopped_timeout: float = 10.0
    deaf_timeout: float = 5.0
    policy: RestartPolicy = field(default_factory=RestartPolicy)
    held: tuple[str, ...] = ()
    duties: tuple[str, ...] = ()
    accuses: tuple[Accuses, ...] = ()  # duties of a witness
    keep_limit: int = 0  # how many descriptors it may give to be kept for its successors
    oom_score_adj: int = 0
    confinement: Confinement | None = None  # None: it may what the watchdog may
    # Without it the tree does no good: the service manager is to replace all of it then.
    vital: bool = True
    # A second process is forked ahead and waits, all prepared, in `Child.stand_by`, which the
    # target calls: the successor is there before it is needed.
    standby: bool = False

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("-", "").isalnum():
            raise ValueError(f"child {self.name!r}: a name is letters, digits and '-'")
        if len(self.duties) > MAX_DUTIES:
            raise ValueError(
                f"child {self.name}: {len(self.duties)} duties, a beat carries {MAX_DUTIES}"
            )
        for what in (
            "start_timeout",
            "hang_timeout",
            "stop_timeout",
            "stopped_timeout",
            "deaf_timeout",
        ):
            if getattr(self, what) <= 0:
                raise ValueError(f"child {self.name}: {what} must be above 0")


@dataclass(frozen=True)
class HeldSpec:
    """Something that outlives every child: ``open()`` returns its descriptors, once.

    ``key`` says what it is, in values that can be compared: a reload opens it anew (and
    replaces the children that name it) only if its key has changed.
    """

    name: str
    open: Callable[[], list[int]] = field(compare=False)
    key: Any = None
    # Called instead of ``open`` with what the image before an upgrade held.
    adopt: Callable[[list[int]], None] = field(compare=False, default=lambda _descriptors: None)
    # Whether it outlives the watchdog, where the service manager keeps descriptors: then ``adopt``
    # is called with what was kept, and ``open`` after it, which goes on with that.
    stored: bool = False
    # The name in the runtime directory by which others find it: removed there, it is opened anew.
    name_in_runtime_dir: str = ""


@dataclass(frozen=True)
class Upgrade:
    """How a daemon's program is tried, and how it is resumed.

    ``package``: what is copied.  ``main``: "module:function", called with ``arguments`` and
    ``--resume-fd N`` in the new image; it is to call `run_tree` with ``resume_fd=N``.
    ``trial``: a command that exits with 0 if the program on disk would start.
    """

    package: str
    main: str
    arguments: tuple[str, ...]
    trial: tuple[str, ...]


@dataclass(frozen=True)
class TreeSpec:
    """A supervised tree.  Children start in this order and stop in the reverse one.

    ``title`` is the watchdog's command line and the first part of each child's; ``comm`` is
    what ``killall`` and ``pidof`` find all of them by.
    """

    name: str
    children: tuple[ChildSpec, ...]
    runtime_dir: str  # lock, pid file, control socket
    state_dir: str  # journal, crash reports, log
    held: tuple[HeldSpec, ...] = ()
    title: str = ""
    comm: str = ""
    beat_interval: float = 0.2
    nice: int = 0
    oom_score_adj: int = 0  # of the watchdog
    # That the watchdog keeps, if it has any (names as in `sandbox`); None: all.
    capabilities: tuple[str, ...] | None = None
    log: Any = None  # settings of the log child (logchild.LogSettings); None: its defaults
    log_confinement: Confinement | None = None
    upgrade: Upgrade | None = None  # how it goes over to new code; None: it cannot

    def __post_init__(self) -> None:
        names = [child.name for child in self.children]
        for name in names:
            if name == LOG_CHILD or names.count(name) > 1:
                raise ValueError(f"tree {self.name}: the child name {name!r} is taken")
        held = [one.name for one in self.held]
        for child in self.children:
            for accuses in child.accuses:
                for accused in accuses.accused:
                    if accused not in names:
                        raise ValueError(
                            f"child {child.name} accuses {accused!r}, which is no child"
                        )
                self._check_excuses(accuses)
                if accuses.looks and accuses.looks not in child.duties:
                    raise ValueError(f"child {child.name} has no duty {accuses.looks!r}")
            for name in child.held:
                if name not in held:
                    raise ValueError(f"child {child.name}: nothing held is named {name!r}")
            if child.hang_timeout < 3 * self.beat_interval:
                raise ValueError(
                    f"child {child.name}: hang_timeout {child.hang_timeout} s is shorter than "
                    f"three beats of {self.beat_interval} s"
                )

    def _check_excuses(self, accuses: Accuses) -> None:
        for accused in self.children:
            unknown = set(accuses.excused_by) - set(accused.duties)
            if accused.name in accuses.accused and unknown:
                raise ValueError(f"child {accused.name} has no duty {sorted(unknown)}")
