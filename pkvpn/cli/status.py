"""`status` and `tree`.

Strategy: the watchdog is asked once and /proc read directly, so that a sick machine still gets an
answer: no library is loaded, nothing is waited for beyond a short time-out.  The exit code is the
Linux Standard Base's: 0 runs, 1 dead but left its pid file, 3 does not run, 4 cannot be known.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pkvpn.cli import FAILED, NOT_RUNNING, OK, Command, Refusal, complain
from pkvpn.cli.runtime import (
    holders,
    is_running,
    load_settings,
    pid_file_names,
    watchdog_pid,
)
from pkvpn.cli.text import printable, table
from pkvpn.config import Address, Settings
from pkvpn.watchdog.control import ControlError, ask
from pkvpn.watchdog.procfs import pids, title_of

DEAD_WITH_PID_FILE = 1
DOES_NOT_RUN = 3
UNKNOWN = 4

# The watchdog promises 0.1 s; more means that it hangs or that the machine does.
_WATCHDOG_TIMEOUT = 1.0

# A core that is just being replaced must not make `status` slow.
_CORE_TIMEOUT = 0.2
# For thousands of connections, which only `--json` shows.
_LIST_TIMEOUT = 2.0


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _status(args: argparse.Namespace) -> int:
    settings = load_settings(args.config)
    code, sentence, status = _look(settings)
    if status is not None:
        status["core"] = _ask_core(settings, "status")
        status["sessions"] = status["core"] and status["core"]["sessions"]
    if args.json:
        if status is not None:
            status["connections"] = _connections(settings)
        print(json.dumps(status or _nothing(settings, code, sentence), indent=2))
    elif status is None:
        print(sentence)
    else:
        print("\n".join(_human(status)))
    return code


def _health(args: argparse.Namespace) -> int:
    """By what systemd's watchdog is fed: neither a canary nor a log that is being replaced is a
    reason to replace all."""
    _, sentence, status = _look(load_settings(args.config))
    good = status is not None and status["good"] and status["state"] != "stopping"
    if status is not None:
        sentence = "The service serves." if good else f"The service is {status['state']}."
    print(sentence)
    return OK if good else FAILED


def _look(settings: Settings) -> tuple[int, str, dict[str, Any] | None]:
    """Return the exit code, a sentence if there is no answer, and the watchdog's answer."""
    if not is_running(settings):
        dead = pid_file_names(settings)
        if dead is None:
            return DOES_NOT_RUN, "The service is not running.", None
        return DEAD_WITH_PID_FILE, f"The service is dead; its pid file names process {dead}.", None
    try:
        answer: dict[str, Any] = ask(
            str(settings.control_socket), "status", timeout=_WATCHDOG_TIMEOUT
        )
    except (OSError, ControlError) as error:
        return *_unanswered(settings, str(error)), None
    return OK, "", answer


def _unanswered(settings: Settings, why: str) -> tuple[int, str]:
    """Tell a watchdog that does not answer from one that is dead and left something behind."""
    left = ", ".join(map(str, holders(settings))) or "none that can be seen"
    if watchdog_pid(settings) is not None:
        return UNKNOWN, (
            f"The watchdog runs but does not answer ({why}). Processes of the service: {left}."
        )
    return DEAD_WITH_PID_FILE, f"The watchdog is dead. Processes that it left behind: {left}."


def _nothing(settings: Settings, code: int, sentence: str) -> dict[str, Any]:
    """Return what `--json` says without an answer, with the keys of the real one."""
    return {
        "state": {DEAD_WITH_PID_FILE: "dead", DOES_NOT_RUN: "down"}.get(code, "unknown"),
        "mode": settings.mode,
        "error": sentence,
        "watchdog": None,
        "children": [],
        "listeners": [],
        "sessions": None,
        "core": None,
        "connections": None,
    }


def _ask_core(settings: Settings, verb: str, timeout: float = _CORE_TIMEOUT, **args: str) -> Any:
    """Ask the core; None if it cannot be known at the moment."""
    try:
        return ask(str(settings.admin_socket), verb, args, timeout=timeout)
    except (OSError, ControlError):
        return None


def _connections(settings: Settings) -> list[dict[str, Any]] | None:
    """Every connection of a client; None if not all can be had in time."""
    found: list[dict[str, Any]] = []
    page = _ask_core(settings, "connection.list")
    deadline = time.monotonic() + _LIST_TIMEOUT
    while page:
        found += page
        left = max(0.001, deadline - time.monotonic())
        page = _ask_core(settings, "connection.list", left, after=page[-1]["id"])
    return None if page is None else found


# --- for people ----------------------------------------------------------------------------------

_COLUMNS = (
    ("NAME", "name"),
    ("PID", "pid"),
    ("STATE", "state"),
    ("WHY", "why"),
    ("VERDICT", "verdict"),
    ("UPTIME", "uptime"),
    ("RESTARTS", "restarts"),
    ("BEAT", "last_beat_age"),
    ("LAG", "loop_lag"),
    ("CPU", "cpu"),
    ("RSS", "rss"),
    ("FDS", "fds"),
)


def _human(status: dict[str, Any]) -> Iterator[str]:
    watchdog = status["watchdog"]
    sessions = "unknown" if status["sessions"] is None else status["sessions"]
    yield (
        f"Service: {status['state']} ({status['mode']} mode), watchdog pid {watchdog['pid']}, "
        f"up {_duration(watchdog['uptime'])}, sessions: {sessions}"
    )
    yield from _traffic(status["core"] or {})
    yield ""
    rows = [[title for title, _ in _COLUMNS]]
    rows += [[_cell(key, child.get(key)) for _, key in _COLUMNS] for child in status["children"]]
    yield from table(rows)
    yield ""
    for listener in status["listeners"]:
        address = Address(listener["address"], listener["port"])
        why = f": {listener['error']}" if listener.get("error") else ""
        yield f"{address!s:24} {listener['state']}{why}"
    yield from _confinement(status["children"])


def _confinement(children: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What the kernel holds each child to; what is not in force says why."""
    confined = [child for child in children if child.get("confinement")]
    if confined:
        yield ""
    for child in confined:
        held = child["confinement"].items()
        yield f"{child['name']}: " + ", ".join(f"{what} {how}" for what, how in held)


def _traffic(core: dict[str, Any]) -> Iterator[str]:
    """What the core says of all connections; nothing that is nothing."""
    for key, title in (
        ("records", "Connections by record layer"),
        ("drops", "Frames dropped"),
        ("refused", "Turned away"),
    ):
        if core.get(key):
            counts = (f"{count} {printable(name)}" for name, count in core[key].items())
            yield f"{title}: {', '.join(counts)}"


def _cell(key: str, value: Any) -> str:
    if value is None or value == "":
        return "-"
    if key == "uptime":
        return _duration(value)
    if key in ("last_beat_age", "loop_lag"):
        return f"{value * 1000:.0f}ms" if value < 10 else _duration(value)
    if key == "cpu":
        return f"{value:.1f}%"
    if key == "rss":
        return f"{value / 1048576:.1f}M"
    return str(value)


def _duration(seconds: float) -> str:
    """Write the two largest units: 4s, 3m12s, 2h05m, 9d04h."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


# --- tree ----------------------------------------------------------------------------------------


class _Process(NamedTuple):
    """One process as /proc shows it; times in clock ticks, memory in KiB."""

    pid: int
    parent: int
    user: str
    state: str
    tty: int
    ticks: int
    started: int
    vsz: int
    rss: int
    command: str


def _tree(args: argparse.Namespace) -> int:
    settings = load_settings(args.config)
    code, sentence, status = _look(settings)
    holding = holders(settings)
    if status is not None:
        roots = [int(status["watchdog"]["pid"])]
    elif code == UNKNOWN:
        complain(sentence)
        roots = [watchdog_pid(settings) or 0]
    elif holding:
        complain(sentence)
        roots = []
    else:
        raise Refusal(sentence, NOT_RUNNING)
    print("\n".join(draw_tree(_read_processes(), roots, holding)))
    return OK if status is not None else code


def draw_tree(
    processes: dict[int, _Process], roots: Sequence[int], others: Sequence[int]
) -> Iterator[str]:
    """Write the trees below `roots`, then what of `others` is in none of them, as ps does."""
    children: dict[int, list[int]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process.pid)
    shown: set[int] = set()
    ticks = os.sysconf("SC_CLK_TCK")
    memory = os.sysconf("SC_PHYS_PAGES") * (os.sysconf("SC_PAGE_SIZE") // 1024)
    uptime = time.clock_gettime(time.CLOCK_BOOTTIME)

    def below(pid: int, stem: str, joint: str, continued: str) -> Iterator[str]:
        if pid in shown or pid not in processes:
            return
        shown.add(pid)
        yield _line(processes[pid], stem + joint, ticks, memory, uptime)
        following = sorted(children.get(pid, ()))
        for child in following:
            stem_below = "    " if child == following[-1] else " |  "
            yield from below(child, stem + continued, r" \_ ", stem_below)

    yield (
        f"{'USER':8} {'PID':>7} {'%CPU':>4} {'%MEM':>4} {'VSZ':>7} {'RSS':>6} {'TTY':8} "
        f"{'STAT':4} {'START':>5} {'TIME':>6} COMMAND"
    )
    for root in (*roots, *others):
        yield from below(root, "", "", "")


def _line(process: _Process, stem: str, ticks: int, memory: int, uptime: float) -> str:
    age = max(0.01, uptime - process.started / ticks)
    spent = process.ticks / ticks
    began = time.localtime(time.time() - age)
    start = time.strftime("%H:%M" if age < 86400 else "%b%d", began)
    return (
        f"{process.user:8.8} {process.pid:7} {100 * spent / age:4.1f} "
        f"{100 * process.rss / memory:4.1f} {process.vsz:7} {process.rss:6} "
        f"{_tty(process.tty):8} {process.state:4} {start:>5} "
        f"{int(spent) // 60:3}:{int(spent) % 60:02} {stem}{process.command}"
    )


def _tty(number: int) -> str:
    if number == 0:
        return "?"
    # proc(5): major in bits 15 to 8, minor in bits 31 to 20 and 7 to 0; 136 to 143 are pts.
    major, minor = number >> 8 & 0xFF, number >> 12 & 0xFFF00 | number & 0xFF
    return f"pts/{minor + 256 * (major - 136)}" if 136 <= major <= 143 else f"{major}:{minor}"


def _read_processes() -> dict[int, _Process]:
    found: dict[int, _Process] = {}
    for pid in pids():
        try:
            found[pid] = _read_process(pid)
        except OSError:
            continue  # it has ended since, or is hidden from us
    return found


def _read_process(pid: int) -> _Process:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        text = file.read()
    name = text[text.index("(") + 1 : text.rindex(")")]
    # proc(5), counted from field 3, the first one after the name in brackets.
    fields = text[text.rindex(")") + 2 :].split()
    session, nice, threads = int(fields[3]), int(fields[16]), int(fields[17])
    # The letters behind the state are those of ps(1).
    state = fields[0] + ("<" if nice < 0 else "N" if nice > 0 else "")
    state += ("s" if session == pid else "") + ("l" if threads > 1 else "")
    command = title_of(pid) or f"[{name}]" + (" <defunct>" if fields[0] == "Z" else "")
    return _Process(
        pid=pid,
        parent=int(fields[1]),
        user=_user(os.stat(f"/proc/{pid}").st_uid),
        state=state,
        tty=int(fields[4]),
        ticks=int(fields[11]) + int(fields[12]),
        started=int(fields[19]),
        vsz=int(fields[20]) // 1024,
        rss=int(fields[21]) * (os.sysconf("SC_PAGE_SIZE") // 1024),
        command=printable(command),
    )


def _user(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


COMMANDS = {
    "status": Command(_status_arguments, _status),
    "health": Command(lambda _parser: None, _health),
    "tree": Command(lambda _parser: None, _tree),
}
