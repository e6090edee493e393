"""What /proc says about a process.

Strategy: every source is optional.  A file that is missing, denied (hidepid, another user) or of
an unknown form makes one field None and never an exception: /proc is evidence, not a condition.
Raw reads, because `read_facts` runs in the watchdog's loop between two beats.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import lru_cache

from pkvpn.watchdog.verdict import Facts

__all__ = [
    "boot_id",
    "children_of",
    "clocks",
    "descendants",
    "fd_count",
    "is_zombie",
    "open_inodes",
    "parent_of",
    "pids",
    "read_facts",
    "read_identity",
    "snapshot_text",
    "title_of",
]

_TICK = 1.0 / os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGESIZE")

# Before Linux 6.2 the size of /proc/PID/fd is 0 and descriptors are counted one by one; with
# more than these that would take longer than a beat is worth.
_COUNTED_FDS = 1024

# Bounds of one snapshot in a crash report, in characters of one entry and in descriptors.
_ENTRY_LIMIT = 4096
_FDS_LISTED = 64


def _read(path: str, limit: int = 8192) -> str | None:
    """The first ``limit`` bytes of a file of /proc or /sys, or None."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, limit).decode(errors="replace")
    except OSError:
        return None
    finally:
        os.close(fd)


def _stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on (state, ppid, ...).

    The second, the name in brackets, may hold blanks and brackets itself.
    """
    text = _read(f"/proc/{pid}/stat")
    if text is None:
        return None
    fields = text[text.rfind(")") + 1 :].split()
    return fields if len(fields) >= 22 else None


def read_facts(pid: int) -> Facts | None:
    """What the process looks like now; None if it is gone or nothing can be read."""
    fields = _stat_fields(pid)
    if fields is None:
        return None
    # One open directory would save look-ups, and cost more calls than it saves.
    run_ns, wait_ns = _schedstat(pid)
    status = _read(f"/proc/{pid}/status") or ""
    dumping = _status_number(status, "CoreDumping")
    try:
        return Facts(
            state=fields[0],
            run_ns=run_ns,
            wait_ns=wait_ns,
            utime=int(fields[11]) * _TICK,
            stime=int(fields[12]) * _TICK,
            wchan=_wchan(pid),
            tracer_pid=_status_number(status, "TracerPid"),
            core_dumping=None if dumping is None else dumping != 0,
            frozen=_frozen(pid),
            threads=int(fields[17]),
            rss_bytes=int(fields[21]) * _PAGE,
            fds=fd_count(pid, _status_number(status, "FDSize")),
            start_time=int(fields[19]),
            ppid=int(fields[1]),
            session=int(fields[3]),
        )
    except ValueError:
        return None


def read_identity(pid: int) -> tuple[int, str] | None:
    """(start time in ticks since boot, boot id): what tells a process from a later one that
    was given the same pid."""
    fields = _stat_fields(pid)
    if fields is None:
        return None
    try:
        return int(fields[19]), boot_id()
    except ValueError:
        return None


def is_zombie(pid: int) -> bool:
    """Whether it has ended and only waits to be reaped."""
    return state_of(pid) in {"Z", "X", "x"}


def state_of(pid: int) -> str:
    """The letter of its state, as `ps` shows it; empty if it is gone."""
    fields = _stat_fields(pid)
    return fields[0] if fields is not None else ""


def parent_of(pid: int) -> int | None:
    fields = _stat_fields(pid)
    return int(fields[1]) if fields is not None and fields[1].isdigit() else None


def title_of(pid: int) -> str:
    """The command line as `ps` shows it; empty for a zombie or what cannot be read."""
    text = _read(f"/proc/{pid}/cmdline") or ""
    return text.rstrip("\0").replace("\0", " ").strip()


@lru_cache(maxsize=1)
def boot_id() -> str:
    """Which start of the machine this is; empty if the system does not say."""
    return (_read("/proc/sys/kernel/random/boot_id") or "").strip()


def clocks() -> float:
    """CLOCK_BOOTTIME minus CLOCK_MONOTONIC: seconds spent in suspend since the boot.

    If it grows between two calls, the machine slept in between.  0.0 where there is no such
    clock.
    """
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    if boottime is None:
        return 0.0
    # Monotonic last: a pause between the two calls must not look like a suspend.
    return max(0.0, time.clock_gettime(boottime) - time.clock_gettime(time.CLOCK_MONOTONIC))


def pids() -> list[int]:
    """All processes that we can see."""
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []


def children_of(pid: int) -> list[int]:
    """Its direct children, zombies included."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    found: list[int] = []
    for task in tasks:
        # 64 KB: some thousand children; a larger buffer costs more than the rest of the call.
        text = _read(f"/proc/{pid}/task/{task}/children", 1 << 16)
        if text is None:
            if not os.path.exists(f"/proc/{pid}/task/{task}"):
                continue  # the thread ended meanwhile
            # A kernel without CONFIG_PROC_CHILDREN.
            return [other for other in pids() if parent_of(other) == pid]
        found.extend(int(word) for word in text.split())
    return found


def descendants(pid: int) -> list[int]:
    """Its children, their children and so on, parents before children, zombies included.

    A child whose parent has died belongs to the subreaper above and is not found below ``pid``.
    """
    found: list[int] = []
    seen = {pid}
    queue = [pid]
    while queue:
        for child in children_of(queue.pop(0)):
            if child not in seen:  # a pid may be used again while we walk
                seen.add(child)
                found.append(child)
                queue.append(child)
    return found


def open_inodes(pid: int) -> set[int] | None:
    """Inodes of the pipes and sockets it has open; None if that cannot be read.

    Those that stand for one object only: an anonymous inode (epoll, pidfd) is shared by all.
    """
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return None
    inodes = set()
    for name in names:
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue  # closed meanwhile
        kind, _, rest = target.partition(":[")
        if kind in {"pipe", "socket"} and rest.endswith("]") and rest[:-1].isdigit():
            inodes.add(int(rest[:-1]))
    return inodes


def snapshot_text(pid: int) -> dict[str, str]:
    """What a crash report shows of a process; per source its text, or why there is none.

    No memory map: it is long, and with the address layout of a forked child a gift to whoever
    reads the report and probes its successor.
    """
    snapshot = {}
    for name in ("stat", "status", "schedstat", "wchan", "stack", "syscall", "limits", "cgroup"):
        try:
            with open(f"/proc/{pid}/{name}", errors="replace") as file:
                text = file.read(_ENTRY_LIMIT)
        except OSError as error:
            text = f"({error.strerror})"
        snapshot[name] = text.strip()
    snapshot["fds"] = _fd_list(pid)
    return snapshot


def _fd_list(pid: int) -> str:
    lines: list[str] = []
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                if len(lines) == _FDS_LISTED:
                    lines.append("... and more")  # perhaps ten thousand: not counted here
                    break
                try:
                    lines.append(f"{entry.name} {os.readlink(entry.path)}")
                except OSError:
                    lines.append(f"{entry.name} (closed meanwhile)")
    except OSError as error:
        return f"({error.strerror})"
    return "\n".join(lines)


def _schedstat(pid: int) -> tuple[int | None, int | None]:
    """Nanoseconds its main thread ran, and waited for a processor.

    A wait is added when it ends: a task that has waited since the last reading shows no growth.
    """
    words = (_read(f"/proc/{pid}/schedstat", 128) or "").split()
    if len(words) < 2 or not (words[0].isdigit() and words[1].isdigit()):
        return None, None
    return int(words[0]), int(words[1])


def _wchan(pid: int) -> str | None:
    text = _read(f"/proc/{pid}/wchan", 128)
    # "0": on a processor, or the kernel does not tell us.
    return None if text is None or text in {"", "0"} else text


def _status_number(status: str, key: str) -> int | None:
    at = status.find(f"\n{key}:\t")
    if at < 0:
        return None
    word = status[at + len(key) + 3 :].split(None, 1)[:1]
    return int(word[0]) if word and word[0].isdigit() else None


def fd_count(pid: int, table_size: int | None = None) -> int | None:
    """How many descriptors it has open; None if that cannot be read, or not without effort."""
    directory = f"/proc/{pid}/fd"
    try:
        count = os.stat(directory).st_size
        if count > 0:
            return count
        if table_size is None:
            table_size = _status_number(_read(f"/proc/{pid}/status") or "", "FDSize")
        if table_size is None or table_size > _COUNTED_FDS:
            return None
        return len(os.listdir(directory))
    except OSError:
        return None


# The freezer


def _frozen(pid: int) -> bool | None:
    """Whether its cgroup is frozen or about to be; None if no freezer can be read.

    Both freezers are looked at: in a hybrid layout a task is in one cgroup of each.
    """
    text = _read(f"/proc/{pid}/cgroup")
    if text is None:
        return None
    known = False
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            frozen = _frozen_v2(group)
        elif "freezer" in controllers.split(","):
            frozen = _frozen_v1(group)
        else:
            continue
        if frozen:
            return True
        known = known or frozen is not None
    return False if known else None


def _frozen_v1(group: str) -> bool | None:
    if group == "/":
        return False  # the root cgroup cannot be frozen
    for directory in _group_directories("freezer", group):
        # FREEZING counts: it stays so as long as one task of the group is in D.
        state = _read(f"{directory}/freezer.state", 32)
        if state is not None:
            return state.strip() in {"FROZEN", "FREEZING"}
    return None


def _frozen_v2(group: str) -> bool | None:
    if group == "/":
        return False
    for directory in _group_directories("", group):
        # cgroup.events tells what is in effect, from an ancestor too; cgroup.freeze what this
        # group was asked for, and that comes first.
        events = _read(f"{directory}/cgroup.events", 256)
        asked = _read(f"{directory}/cgroup.freeze", 16)
        if events is not None or asked is not None:
            return "frozen 1" in (events or "") or (asked or "").strip() == "1"
    return None


def _group_directories(controller: str, group: str) -> Iterator[str]:
    """Where this cgroup's files may be; ``controller`` "": version 2."""
    for kind, root, mount_point in _cgroup_mounts():
        if kind != controller:
            continue
        if root == "/":
            yield mount_point + group
        elif group == root or group.startswith(root + "/"):
            # A container that sees a part of the tree only.
            yield mount_point + group[len(root) :]


@lru_cache(maxsize=1)
def _cgroup_mounts() -> tuple[tuple[str, str, str], ...]:
    """(controller, or "" for version 2; root of the mount; mount point), read once: cgroups
    are mounted at the boot."""
    mounts = []
    for line in (_read("/proc/self/mountinfo", 1 << 20) or "").splitlines():
        before, _, after = line.partition(" - ")
        fields, tail = before.split(), after.split()
        if len(fields) < 5 or len(tail) < 3:
            continue
        if tail[0] == "cgroup2":
            mounts.append(("", fields[3], fields[4]))
        elif tail[0] == "cgroup" and "freezer" in tail[2].split(","):
            mounts.append(("freezer", fields[3], fields[4]))
    return tuple(mounts)
