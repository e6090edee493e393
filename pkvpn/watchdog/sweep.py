"""Ending processes by force: a whole tree, what a dead tree left, what a dead child left.

Strategy: needs nothing from those it ends: no control socket, no answer, no fork.  Every signal
goes through a pidfd that was opened first and checked after, so it never reaches a process that
was given the pid later.  SIGKILL ends stopped ones too; a process that is frozen or in
uninterruptible sleep is named as still there.  Every wait is bounded.  A zombie counts as gone.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from pkvpn.watchdog import instance, procfs

__all__ = ["KillResult", "kill_orphans", "kill_tree", "sweep_leftovers", "take_over"]

# A process that forks while it is being killed leaves one more: look again, but not for ever.
_ROUNDS = 10


@dataclass
class KillResult:
    """``killed``: pids that are gone by our signal; ``gone``: that ended before it;
    ``survived``: pid and why it is still there; ``refused``: why nothing was tried, or ""."""

    killed: list[int] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)
    survived: dict[int, str] = field(default_factory=dict)
    refused: str = ""

    @property
    def ok(self) -> bool:
        """Nothing is left."""
        return not self.survived and not self.refused


class _Target:
    """A process and the pidfd by which it is killed."""

    def __init__(self, pid: int, fd: int) -> None:
        self.pid = pid
        self.fd = fd

    @classmethod
    def open(cls, pid: int, is_it: Callable[[int], bool]) -> _Target | None:
        """The process that has this pid now, if ``is_it`` says so after the pidfd was opened:
        then both mean the same process, however fast pids are used again."""
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            return None
        if procfs.is_zombie(pid) or not is_it(pid):
            os.close(fd)
            return None
        return cls(pid, fd)

    def kill(self) -> str:
        """ "" or why not."""
        try:
            signal.pidfd_send_signal(self.fd, signal.SIGKILL)
        except ProcessLookupError:
            return ""
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def close(self) -> None:
        os.close(self.fd)


def _wait_gone(targets: Iterable[_Target], deadline: float) -> set[int]:
    """Wait until all have ended or the deadline; the pids of those that have not."""
    poller = select.poll()
    left = {target.fd: target.pid for target in targets}
    for fd in left:
        poller.register(fd, select.POLLIN)
    while left:
        rest = deadline - time.monotonic()
        ready = poller.poll(max(0, rest) * 1000)
        for fd, _ in ready:
            poller.unregister(fd)
            del left[fd]
        if not ready and rest <= 0:
            break
    return set(left.values())


def _kill(targets: list[_Target], deadline: float, result: KillResult) -> None:
    """Kill and wait; takes the targets over and closes them."""
    refused = {target.pid: why for target in targets if (why := target.kill())}
    waiting = [target for target in targets if target.pid not in refused]
    alive = _wait_gone(waiting, deadline)
    for target in targets:
        if target.pid in refused:
            result.survived[target.pid] = refused[target.pid]
        elif target.pid in alive:
            result.survived[target.pid] = _why_alive(target.pid)
        elif target.pid not in result.killed:
            result.killed.append(target.pid)
            result.survived.pop(target.pid, None)
        target.close()


def _why_alive(pid: int) -> str:
    facts = procfs.read_facts(pid)
    if facts is None:
        return "SIGKILL sent, still there"
    if facts.frozen:
        return "SIGKILL sent, but its cgroup is frozen: it ends at the thaw"
    place = f" in {facts.wchan}" if facts.wchan else ""
    return f"SIGKILL sent, still there in state {facts.state}{place}"


def kill_tree(
    runtime_dir: str, log: Callable[[str], None] = print, budget: float = 5.0
) -> KillResult:
    """End a whole tree by force: the watchdog first, then what remains.

    In the other order the watchdog would start anew what was killed.  Found by the lock file
    alone: the watchdog is who has the claim, the others hold the lock or descend from one that
    does.  Waits at most ``budget`` seconds.  Says on ``log`` what happens, a line a process.
    """
    deadline = time.monotonic() + budget
    lock_path = os.path.join(runtime_dir, instance.LOCK_NAME)
    result = KillResult()
    # Before the watchdog is killed: its children's children are found below it only now.
    holders = set(instance.holders(lock_path))
    members: dict[int, tuple[int, str] | None] = {}
    _add_members(members, holders)
    watchdog = _find_watchdog(runtime_dir, lock_path, holders)
    if watchdog in members:
        # Half of the time: if it cannot end (frozen), the others are killed all the same.
        alone = {watchdog: members.pop(watchdog)}
        half = time.monotonic() + budget / 2
        _kill_members(alone, "watchdog", deadline=half, result=result, log=log)
    for _ in range(_ROUNDS):
        _add_members(members, set(instance.holders(lock_path)) - set(result.survived))
        if not members or time.monotonic() >= deadline:
            break
        _kill_members(members, "remaining", deadline=deadline, result=result, log=log)
        members = {}
    for pid in set(instance.holders(lock_path)) - set(result.survived):
        result.survived[pid] = _why_not_tried(pid)
        log(f"{pid}: {result.survived[pid]}")
    if not (result.killed or result.gone or result.survived):
        _say_nothing_found(runtime_dir, result, log)
    return result


def _why_not_tried(pid: int) -> str:
    if pid == 1:
        return "is process 1 of its container and immune in there: end the container"
    if pid in _protected():
        return "not killed: we run below it"
    return "came while we killed"


def _say_nothing_found(runtime_dir: str, result: KillResult, log: Callable[[str], None]) -> None:
    """Nobody holds the lock, as far as we may look."""
    pid_file = instance.read_pid_file(os.path.join(runtime_dir, instance.PID_NAME))
    if pid_file is not None and instance.pid_file_is_alive(pid_file):
        why = "it belongs to another user, whose open files we may not see"
        result.survived[pid_file.pid] = why
        log(f"{pid_file.pid} (watchdog by its pid file): {why}")
    else:
        log(f"No such process: nothing of the instance in {runtime_dir} is left")


def _add_members(members: dict[int, tuple[int, str] | None], holders: set[int]) -> None:
    """Add the holders and all below them, with the identity they have now."""
    protected = _protected()
    for holder in holders:
        for pid in [holder, *procfs.descendants(holder)]:
            if pid not in members and pid not in protected:
                members[pid] = procfs.read_identity(pid)


def _protected() -> set[int]:
    """Ourselves and those above us: whoever typed `kill` in a shell below the tree."""
    found = {os.getpid(), 1}
    pid = procfs.parent_of(os.getpid())
    while pid and pid not in found:
        found.add(pid)
        pid = procfs.parent_of(pid)
    return found


def _find_watchdog(runtime_dir: str, lock_path: str, holders: set[int]) -> int | None:
    """Who has the claim; else who wrote the pid file and holds the lock; else the holder
    that no holder is the parent of, if there is one only."""
    claimed = instance.watchdog_pid(lock_path)
    if claimed in holders:
        return claimed
    pid_file = instance.read_pid_file(os.path.join(runtime_dir, instance.PID_NAME))
    if pid_file is not None and pid_file.pid in holders and instance.pid_file_is_alive(pid_file):
        return pid_file.pid
    roots = [pid for pid in holders if procfs.parent_of(pid) not in holders]
    return roots[0] if len(roots) == 1 else None


def _kill_members(
    members: dict[int, tuple[int, str] | None],
    role: str,
    *,
    deadline: float,
    result: KillResult,
    log: Callable[[str], None],
) -> None:
    targets = []
    for pid, identity in members.items():
        target = _Target.open(pid, partial(_has_identity, identity))
        if target is not None:
            targets.append(target)
        elif pid not in result.killed:
            result.gone.append(pid)
            log(f"{pid} ({role}): No such process, it has already ended")
    tried = [target.pid for target in targets]
    _kill(targets, deadline, result)
    for pid in tried:
        log(f"{pid} ({role}): {result.survived.get(pid, 'killed')}")


def _has_identity(identity: tuple[int, str] | None, pid: int) -> bool:
    return identity is not None and procfs.read_identity(pid) == identity


def _has_parent(parent: int | None, pid: int) -> bool:
    return parent is not None and procfs.parent_of(pid) == parent


def sweep_leftovers(
    runtime_dir: str, log: Callable[[str], None] = lambda _line: None, budget: float = 2.0
) -> KillResult:
    """Kill what a dead watchdog left: every process that still holds the lock.

    Never touches the tree of a live watchdog: the sweeper takes the claim itself first, and
    keeps it until it is done, so that no other start runs beside it.  To be called by a start
    whose `InstanceLock.acquire` gave None; acquire again after.
    """
    lock_path = os.path.join(runtime_dir, instance.LOCK_NAME)
    claim = instance.Claim.take(lock_path)
    if claim is None:
        pid = instance.watchdog_pid(lock_path)
        return KillResult(refused=f"the watchdog lives{f' (pid {pid})' if pid else ''}")
    deadline = time.monotonic() + budget
    result = KillResult()
    try:
        for _ in range(_ROUNDS):
            members: dict[int, tuple[int, str] | None] = {}
            _add_members(members, set(instance.holders(lock_path)) - set(result.survived))
            if not members:
                break
            _kill_members(members, "left over", deadline=deadline, result=result, log=log)
            if time.monotonic() >= deadline:
                break
    finally:
        claim.release()
    return result


def take_over(
    runtime_dir: str, log: Callable[[str], None] = lambda _line: None
) -> instance.InstanceLock | None:
    """The instance lock, after sweeping what a dead watchdog left; None: a tree lives, or
    something of the old one could not be ended (said on ``log``)."""
    lock_path = os.path.join(runtime_dir, instance.LOCK_NAME)
    lock = instance.InstanceLock.acquire(lock_path)
    if lock is None and sweep_leftovers(runtime_dir, log).ok:
        lock = instance.InstanceLock.acquire(lock_path)
    return lock


def kill_orphans(
    watchdog_children: set[int], spared_inodes: set[int], budget: float = 0.0
) -> list[int]:
    """Kill what dead children left; to be called by the watchdog, a subreaper.

    ``watchdog_children``: pids of the table.  ``spared_inodes``: of the lifelines of the living
    incarnations; who has one open belongs to a living child although its parent is gone.  What
    cannot be looked into is spared as long as any incarnation lives.  Returns the pids killed;
    reaping them is the caller's.  What a dying process leaves comes to us only when it is gone:
    waits ``budget`` seconds at most for that, or is to be called again at the next SIGCHLD.
    """
    me = os.getpid()
    deadline = time.monotonic() + budget
    result = KillResult()
    for _ in range(_ROUNDS):
        targets = []
        for pid in procfs.children_of(me):
            if pid in watchdog_children or pid in result.survived:
                continue
            target = _Target.open(pid, partial(_has_parent, me))
            if target is None:
                continue
            if _is_spared(pid, spared_inodes):
                target.close()
                continue
            targets.append(target)
            # Those below it, too: they come to us when it dies, but that is a round later.
            for below in procfs.descendants(pid):
                identity = procfs.read_identity(below)
                found = _Target.open(below, partial(_has_identity, identity))
                if found is not None:
                    targets.append(found)
        if not targets:
            break
        _kill(targets, deadline, result)
        if time.monotonic() >= deadline:
            break
    return sorted({*result.killed, *result.survived})


def _is_spared(pid: int, spared_inodes: set[int]) -> bool:
    if not spared_inodes:
        return False
    inodes = procfs.open_inodes(pid)
    return inodes is None or not inodes.isdisjoint(spared_inodes)
