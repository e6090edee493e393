"""Who is killed, with what, in which order and when: every combination against the real service.

Strategy: one cell is one way to hit the service.  A cell begins with a service that serves, brings
about the phase, sends the signals, waits for what `expected` promises, looks whether anything was
orphaned, ends what is left (`stop`, or `kill` where the watchdog is stopped) and starts the service
anew, which is where the next cell begins.  The cells of one worker happen in a pid namespace whose
process 1 it is: it sees every process, inherits every orphan, `killall` reaches nobody else, and
whatever is left ends with it.

    python -m tests.system.kill_matrix                 all cells; writes docs/kill-order.md
    python -m tests.system.kill_matrix --sample        a pairwise sample, which CI runs
    python -m tests.system.kill_matrix --only core,KILL,hang    what is named so
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pkvpn import cli
from pkvpn.watchdog import instance, procfs
from pkvpn.watchdog.control import ControlError, ask
from tests.support import eventually

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "kill-order.md"
RESULT = ROOT / "docs" / "kill-matrix.json"
BEGIN, END = "<!-- kill matrix -->\n", "<!-- end of kill matrix -->\n"

# Whom the signals go to; "several" are children that are hit at the same moment.
WHO = {
    "watchdog": (),
    "core": ("core",),
    "edge": ("edge-1",),
    "several": ("log", "core", "edge-1"),
    "group": (),
    "killall": (),
}
# Where there are two to hit.
ORDERS = ("alone", "watchdog first", "child first")
SIGNALS = ("TERM", "INT", "HUP", "QUIT", "KILL", "STOP", "SEGV", "ABRT")
PHASES = {
    "start-up": "whom it is about has just been born, and nobody serves",
    "serving": "everything is up",
    "hang": "the child it is about (else the edge) is silent, and has not been judged yet",
    "respawn": "the same has been killed, and its successor is being made",
    "backoff": "the canary has crashed and waits for its turn to come back",
    "stop": "a stop is under way, and the canary does not answer",
    "upgrade": "the watchdog is a new image and replaces its children; who it is about has just "
    "been replaced (a SEGV or an ABRT to him is held against the new code: the upgrade is undone)",
}
ALL = ("log", "core", "edge-1", "canary")
FATAL = ("KILL", "SEGV", "ABRT")
TITLE = "vpnserver execsvc"

CONFIG = """[service]
listen = ["127.0.0.1:0"]
state_dir = "state"
runtime_dir = "run"
[watchdog]
beat_interval = 0.1
hang_timeout = 0.6
start_timeout = 10.0
stop_timeout = 1.0
# Nobody waits for his turn but who crashed in a wild way.
healthy_after = 0.0
backoff_first = 2.0
backoff_jitter = 0.0
"""

# What every condition may take on a machine that does other things as well.
PATIENCE = 45.0
# For so long what goes on has to go on.
STEADY = 0.2

_MEANINGS = {
    "ends": "nobody is left",
    "goes on": "everybody is up, and nobody had to be replaced for it",
    "comes back": "who was hit has a successor, and everybody is up",
    "comes back, then ends": "it had a successor when the watchdog was hit, and nobody is left",
    "waits": "the watchdog is stopped and so does nothing; `kill` ends it",
}


class Cell(NamedTuple):
    who: str
    order: str
    signal: str
    phase: str

    def __str__(self) -> str:
        return ",".join(self)


@dataclass
class Outcome:
    """What was seen in a cell.  ``error``: what was not as expected, or nothing."""

    cell: Cell
    outcome: str
    error: str = ""


def cells() -> list[Cell]:
    return [
        Cell(who, order, number, phase)
        for who in WHO
        for order in (ORDERS if WHO[who] else ORDERS[:1])
        for number in SIGNALS
        for phase in PHASES
    ]


def pairwise(every: list[Cell], seed: int = 1) -> list[Cell]:
    """A few cells in which any two of their properties that can meet do meet."""
    every = random.Random(seed).sample(every, len(every))
    missing = {pair for cell in every for pair in _pairs(cell)}
    chosen = []
    while missing:
        best = max(every, key=lambda cell: len(missing.intersection(_pairs(cell))))
        chosen.append(best)
        missing.difference_update(_pairs(best))
    return chosen


def _pairs(cell: Cell) -> Iterator[tuple[tuple[int, str], tuple[int, str]]]:
    return itertools.combinations(enumerate(cell), 2)


def expected(cell: Cell) -> str:
    """What the manual for operators promises, as a key of `_MEANINGS`."""
    hits_watchdog = cell.order != "alone" or not WHO[cell.who]
    if hits_watchdog and cell.signal == "STOP":
        return "waits"
    if cell.phase == "stop" or cell.signal in ("TERM", "INT"):
        return "ends"  # a request to end ends the service, whoever gets it
    if cell.signal not in FATAL:
        return "goes on"
    if cell.order == "child first":
        return "comes back, then ends"
    return "ends" if hits_watchdog else "comes back"


# --- one worker -----------------------------------------------------------------------------


class Laboratory:
    """A service, seen from process 1 of its namespace."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lock = str(directory / "run" / instance.LOCK_NAME)
        self._config = str(directory / "pkvpn.toml")
        Path(self._config).write_text(CONFIG, encoding="utf-8")
        self._said = os.open(directory / "said", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        self._ours: dict[int, int | None] = {}  # helpers that we forked -> exit code

    # -- doing

    def begin(self, *words: str) -> int:
        """Have somebody type `vpnserver` and these words; the pid of that."""
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                for number in (1, 2):
                    os.dup2(self._said, number)
                code = cli.main(["--config", self._config, *words])
                sys.stdout.flush()
            finally:
                os._exit(code)
        self._ours[pid] = None
        return pid

    def have(self, *command: str) -> int:
        """Start a program; its pid."""
        pid = os.posix_spawnp(command[0], command, os.environ)
        self._ours[pid] = None
        return pid

    def wait(self, helper: int) -> int:
        def ended() -> bool:
            self._reap()
            return self._ours[helper] is not None

        eventually(ended, within=PATIENCE, every=0.002)
        code = self._ours.pop(helper)
        assert code is not None
        return code

    def run(self, *words: str) -> None:
        code = self.wait(self.begin(*words))
        assert code == 0, f"`{' '.join(words)}` ended with {code}: {self.said()}"

    def send(self, number: str, pids: Iterable[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.Signals[f"SIG{number}"])

    def end_all(self) -> None:
        """By no means of the service's own."""
        for _ in range(10):
            self.send("KILL", [*self.processes(), *self._ours])
            time.sleep(0.05)
        self._reap()
        self._ours.clear()

    # -- seeing

    def _reap(self) -> None:
        """Our own, and whatever has been orphaned: it comes to process 1."""
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = found
                if pid in self._ours:
                    self._ours[pid] = os.waitstatus_to_exitcode(status)

    def processes(self) -> list[int]:
        """Everybody in here but us and those who type."""
        self._reap()
        found = [pid for pid in procfs.pids() if pid != 1 and pid not in self._ours]
        return [pid for pid in found if not procfs.is_zombie(pid)]

    def watchdog(self) -> int:
        """Its pid, or 0."""
        return instance.watchdog_pid(self.lock) or 0

    def pids(self, names: Iterable[str]) -> dict[str, int]:
        """Of those children that are there, by their titles, as an operator finds them."""
        titles = {f"{TITLE}: {name}": name for name in names}
        found = {procfs.title_of(pid): pid for pid in self.processes()}
        return {name: found[title] for title, name in titles.items() if title in found}

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = ask(str(self.directory / "run/control.sock"), "status")
        return found

    def states(self) -> dict[str, str]:
        return {one["name"]: one["state"] for one in self.status()["children"]}

    def is_stopped(self, pid: int) -> bool:
        facts = procfs.read_facts(pid)
        return facts is not None and facts.state == "T"

    def is_whole(self) -> bool:
        """Everybody is up, nothing is under way, and everything there is below one watchdog."""
        status = self.status()
        watchdog = self.watchdog()
        there = self.processes()
        assert set(self.states().values()) == {"up"}, self.states()
        assert status["state"] == "up", status["state"]
        # Undone, too: who crashes in a wild way just after he was replaced has not come up.
        under_way = ("trying", "replacing children")
        assert status["watchdog"]["upgrade"] not in under_way, status["watchdog"]
        assert not [pid for pid in there if self.is_stopped(pid)], "somebody is stopped"
        assert set(self.pids(ALL)) == set(ALL), self.names()
        below = {watchdog, *procfs.descendants(watchdog)}
        assert set(there) <= below, f"orphans: {self.names(set(there) - below)}"
        return True

    def names(self, pids: Iterable[int] | None = None) -> list[str]:
        return [f"{pid} {procfs.title_of(pid)}" for pid in pids or self.processes()]

    def said(self) -> str:
        return (self.directory / "said").read_text(errors="replace")[-500:]


def run_cell(lab: Laboratory, cell: Cell) -> Outcome:
    """Hit the service, which serves; leave one that serves."""
    outcome = Outcome(cell, expected(cell))
    try:
        starter = _bring_about(lab, cell)
        before = lab.pids(ALL)
        _hit(lab, cell)
        _wait_for(lab, cell, outcome.outcome, before)
        _end(lab, outcome.outcome)
        if starter:
            code = lab.wait(starter)
            served = outcome.outcome in ("goes on", "comes back")
            assert code == 0 or not served, f"the first start ended with {code}: {lab.said()}"
        lab.run("start")
        eventually(lab.is_whole, within=PATIENCE)
    except (AssertionError, OSError, KeyError, ControlError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        doing = [frame.line for frame in frames if frame.filename == __file__]
        outcome.error = f"{doing[-2:]}: {type(error).__name__}: {error}; there are {lab.names()}"
        lab.end_all()
        lab.run("start")
    return outcome


def _subjects(cell: Cell) -> tuple[str, ...]:
    """The children a phase is about."""
    return WHO[cell.who] or ("edge-1",)


def _bring_about(lab: Laboratory, cell: Cell) -> int:
    """The phase; the pid of a `start` that has not ended."""
    subjects, before = _subjects(cell), lab.pids(ALL)
    if cell.phase == "start-up":
        lab.run("kill")
        starter = lab.begin("start")
        needed = WHO[cell.who] or (("core",) if cell.who == "killall" else ())
        _soon(lambda: lab.watchdog() and len(lab.pids(needed)) == len(needed))
        return starter
    if cell.phase == "hang":
        lab.send("STOP", [before[name] for name in subjects])
        _soon(lambda: all(lab.is_stopped(before[name]) for name in subjects))
    elif cell.phase == "respawn":
        lab.send("KILL", [before[name] for name in subjects])
        _soon(lambda: _respawned(lab, subjects, before))
    elif cell.phase == "backoff":
        lab.send("SEGV", [before["canary"]])
        _soon(lambda: lab.states()["canary"] == "backoff")
    elif cell.phase == "stop":
        lab.send("STOP", [before["canary"]])
        _soon(lambda: lab.is_stopped(before["canary"]))
        ask(str(lab.directory / "run/control.sock"), "stop")
    elif cell.phase == "upgrade":
        ask(str(lab.directory / "run/control.sock"), "upgrade")
        _soon(lambda: lab.status()["watchdog"]["image"] == 2)
        # Who is just making way may be gone before a signal reaches him.
        _soon(lambda: _respawned(lab, WHO[cell.who], before))
    return 0


def _soon(condition: Callable[[], Any]) -> None:
    """A phase may be short: look all the time."""
    eventually(condition, within=PATIENCE, every=0.0005)


def _respawned(lab: Laboratory, names: Iterable[str], before: dict[str, int]) -> bool:
    """Whether each of them has a successor."""
    now = lab.pids(names)
    return all(name in now and now[name] != before.get(name) for name in names)


def _hit(lab: Laboratory, cell: Cell) -> None:
    if cell.who == "killall":
        # -q: that nobody is left to be hit is said by what is seen.
        lab.wait(lab.have("killall", "-q", f"-{cell.signal}", "vpnserver"))
        return
    watchdog, children = lab.watchdog(), lab.pids(WHO[cell.who])
    if cell.who == "group":
        os.killpg(os.getpgid(watchdog), signal.Signals[f"SIG{cell.signal}"])
    elif cell.order == "watchdog first" or not WHO[cell.who]:
        lab.send(cell.signal, [watchdog, *children.values()])
    else:
        lab.send(cell.signal, children.values())
    if cell.order == "child first":
        if expected(cell) == "comes back, then ends":
            _soon(lambda: _respawned(lab, children, children))
        lab.send(cell.signal, [watchdog])


def _wait_for(lab: Laboratory, cell: Cell, outcome: str, before: dict[str, int]) -> None:
    if outcome.endswith("ends"):
        eventually(lambda: not lab.processes(), within=PATIENCE)
    elif outcome == "waits":
        watchdog = lab.watchdog()
        eventually(lambda: lab.is_stopped(watchdog), within=PATIENCE)
        time.sleep(STEADY)
        assert lab.is_stopped(watchdog)
    else:
        if outcome == "comes back":
            eventually(lambda: _respawned(lab, WHO[cell.who], before), within=PATIENCE)
        eventually(lab.is_whole, within=PATIENCE)
        if outcome == "goes on" and cell.phase in ("serving", "backoff"):
            now = lab.pids(WHO[cell.who])
            assert now == {name: before[name] for name in now}, f"{before} became {now}"
        time.sleep(STEADY)
        eventually(lab.is_whole, within=PATIENCE)


def _end(lab: Laboratory, outcome: str) -> None:
    """By the service's own means, as an operator would."""
    if outcome == "waits":
        lab.run("kill")
    elif not outcome.endswith("ends"):
        lab.run("stop")
    eventually(lambda: not lab.processes(), within=PATIENCE)


def work(directory: Path) -> int:
    """Be process 1 of a namespace: a cell a line comes in, an outcome a line goes out."""
    assert os.getpid() == 1, "this is to be called in a pid namespace of its own"
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lab = Laboratory(directory)
    lab.run("start")
    for line in sys.stdin:
        print(json.dumps(asdict(run_cell(lab, Cell(*json.loads(line))))), flush=True)
    return 0


# --- all of them ----------------------------------------------------------------------------


class _Worker(threading.Thread):
    """Hands cells to one worker process, for as long as there are any."""

    def __init__(self, left: Iterator[Cell], tell: Callable[[Outcome], None]) -> None:
        super().__init__()
        self._left, self._tell = left, tell

    def run(self) -> None:
        directory = tempfile.mkdtemp(prefix="pkvpn-kill-")
        command = ["setpriv", "--pdeathsig", "KILL"]
        command += ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable]
        command += ["-m", "tests.system.kill_matrix", "--work", directory]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for cell in self._left:
                process.stdin.write(json.dumps(cell) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
                if not line:
                    break  # it has said why on stderr
                self._tell(Outcome(**{**json.loads(line), "cell": cell}))
        finally:
            process.stdin.close()  # it ends, and with it everybody in there
            try:
                process.wait(PATIENCE)
            finally:
                process.kill()
                process.wait()
            process.stdout.close()
            shutil.rmtree(directory, ignore_errors=True)


class _Left:
    """An iterator that several threads may draw from."""

    def __init__(self, wanted: Iterable[Cell]) -> None:
        self._wanted = iter(wanted)
        self._lock = threading.Lock()

    def close(self) -> None:
        """There are no more."""
        with self._lock:
            self._wanted = iter(())

    def __iter__(self) -> Iterator[Cell]:
        return self

    def __next__(self) -> Cell:
        with self._lock:
            return next(self._wanted)


def run_cells(
    wanted: list[Cell], jobs: int, tell: Callable[[Outcome], None] = lambda _one: None
) -> list[Outcome]:
    """What came of each, in the order in which they are given; ``jobs`` at a time."""
    found: dict[Cell, Outcome] = {}

    def note(one: Outcome) -> None:
        found[one.cell] = one
        tell(one)

    left = _Left(wanted)
    workers = [_Worker(left, note) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    finally:
        left.close()  # ^C: each ends the cell it is at
        for worker in workers:
            worker.join()
    return [
        found.get(cell) or Outcome(cell, expected(cell), error="the worker died") for cell in wanted
    ]


# --- the table ------------------------------------------------------------------------------


def last_run() -> dict[Cell, Outcome]:
    """What the last whole run saw."""
    lines = json.loads(RESULT.read_text(encoding="utf-8"))
    found = [Outcome(**{**line, "cell": Cell(*line["cell"])}) for line in lines]
    return {one.cell: one for one in found}


def table(results: Collection[Outcome]) -> str:
    """Markdown: who and in which order against the signal; where a phase differs, it says so."""
    seen = {one.cell: "FAILED" if one.error else one.outcome for one in results}
    rows = list(dict.fromkeys(key[:2] for key in seen))
    columns = {number: tuple(_entry(seen, row, number) for row in rows) for number in SIGNALS}
    merged: dict[tuple[str, ...], list[str]] = {}
    for number, column in columns.items():
        merged.setdefault(column, []).append(number)
    lines = [
        "| sent to | " + " | ".join(", ".join(numbers) for numbers in merged.values()) + " |",
        "| --- |" + " --- |" * len(merged),
    ]
    for index, (who, order) in enumerate(rows):
        names = {
            "alone": who,
            "watchdog first": f"watchdog, then {who}",
            "child first": f"{who}, then watchdog",
        }
        entries = " | ".join(column[index] for column in merged)
        lines.append(f"| {names[order]} | {entries} |")
    lines += ["", *(f"- *{word}*: {meaning}." for word, meaning in _MEANINGS.items()), ""]
    lines += [f"- **{phase}**: {meaning}." for phase, meaning in PHASES.items()]
    failed = sum(bool(one.error) for one in results)
    lines += ["", f"{len(results)} cells were run, {failed} of them did not end as expected."]
    return "\n".join(lines) + "\n"


def _entry(seen: dict[Cell, str], row: tuple[str, str], number: str) -> str:
    """What happens in most phases; after it what happens in which others."""
    by_outcome: dict[str, list[str]] = {}
    for phase in PHASES:
        cell = Cell(*row, number, phase)
        if cell in seen:
            by_outcome.setdefault(seen[cell], []).append(phase)
    if not by_outcome:
        return "-"
    usual, *others = sorted(by_outcome, key=lambda one: -len(by_outcome[one]))
    words = "; ".join(f"{', '.join(by_outcome[other])}: {other}" for other in others)
    return f"{usual} ({words})" if words else usual


def with_table(text: str, results: Collection[Outcome]) -> str:
    """The document with the table of these results between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/kill-matrix", description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=4, help="how many cells at a time (4)")
    parser.add_argument("--sample", action="store_true", help="a pairwise sample only")
    parser.add_argument("--only", default="", help="cells with these words, as core,KILL,hang")
    parser.add_argument("--failed", action="store_true", help="what failed in the last run")
    parser.add_argument("--write", action="store_true", help="only write the table of the last run")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        return work(args.work)
    known = last_run() if args.write or args.failed else {}
    if not args.write:
        words = set(filter(None, args.only.split(",")))
        wanted = [cell for cell in cells() if words <= set(cell)]
        wanted = [cell for cell in wanted if not args.failed or known[cell].error]
        wanted = pairwise(wanted) if args.sample else wanted
        began = time.monotonic()
        results = run_cells(wanted, args.jobs, _show)
        failed = [one for one in results if one.error]
        print(f"{len(results)} cells, {len(failed)} failed, {time.monotonic() - began:.0f} s")
        if args.sample or words:
            return bool(failed)
        known |= {one.cell: one for one in results}
        lines = ",\n".join(json.dumps(asdict(known[cell])) for cell in cells())
        RESULT.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(with_table(text, known.values()), encoding="utf-8")
    return any(one.error for one in known.values())


def _show(one: Outcome) -> None:
    print(f"{one.outcome:10} {one.cell} {one.error and f'FAILED: {one.error}'}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
