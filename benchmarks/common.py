"""What all benchmarks share: a laboratory, CPU accounting, results.

Strategy: a program that starts servers calls `lab` first.  It goes on as a new process in network,
mount and process namespaces of its own, so ports never collide, the stock programs reach nothing
outside, and whatever is still running when the program ends, however it ends, is ended by the
kernel.  A result is a table with the facts that it depends on; `render` makes Markdown of it, for
the terminal and for README.md alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"

_TICK = os.sysconf("SC_CLK_TCK")
_IN_LAB = "PKVPN_BENCHMARK_LAB"


# --- the laboratory ------------------------------------------------------------------------------


def lab() -> None:
    """Go on in namespaces of our own; everything started in them ends with this program.

    Needs root.  The program is executed again, so this is to be called before anything is made.
    """
    if os.environ.get(_IN_LAB) != "1":
        if os.geteuid() != 0:
            sys.exit("this benchmark needs root: it makes network namespaces")
        command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child"]
        command += ["--mount-proc", "--propagation", "private", sys.executable, *sys.orig_argv[1:]]
        sys.stdout.flush()
        os.execvpe(command[0], command, {**os.environ, _IN_LAB: "1"})
    del os.environ[_IN_LAB]
    # Programs are measured as they are installed: with their modules compiled.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", "/run"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # thousands of connections
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # A client that opens a connection every millisecond leaves 60,000 in TIME_WAIT.
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("1024 65535")
    worker = os.fork()
    if worker:
        os._exit(_be_init(worker))
    # A TERM unwinds the stack like ^C: files are removed, children are reaped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _be_init(worker: int) -> int:
    """Process 1 of the namespace: reap orphans until the worker ends; return its exit code."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        os.kill(worker, number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's ^C reaches the worker as well
    signal.signal(signal.SIGTERM, pass_on)
    while True:
        pid, status = os.wait()
        if pid == worker:
            return os.waitstatus_to_exitcode(status) & 0xFF


def fork(work: Callable[[], None]) -> int:
    """Run something in a child that ends with it; the pid.  For `wait`."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:  # noqa: BLE001 - the child must never return into our caller
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        sys.stdout.flush()
        os._exit(code)


def end(pids: Iterable[int], with_signal: int = signal.SIGKILL) -> None:
    """End children that `fork` made."""
    pids = list(pids)
    for pid in pids:
        os.kill(pid, with_signal)
    for pid in pids:
        os.waitpid(pid, 0)


@contextmanager
def work_directory() -> Iterator[Path]:
    """A new directory that goes away; other users may pass through it."""
    path = Path(tempfile.mkdtemp(prefix="pkvpn-benchmark-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def wait_until(condition: Callable[[], Any], within: float, what: str, every: float = 0.01) -> Any:
    """The condition's first true value; `TimeoutError` naming what was waited for."""
    deadline = time.monotonic() + within
    while True:
        try:
            value = condition()
        except OSError:
            value = None
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within:g} s: {what}")
        time.sleep(every)


# --- processes -----------------------------------------------------------------------------------


def cpu_seconds(pid: int, *, reaped: bool = False) -> float:
    """CPU time of a process, all its threads; with ``reaped`` also of its children that ended.

    The kernel scales it from the scheduler's own count, so it is exact to one tick (10 ms).
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11 : 15 if reaped else 13]) / _TICK


def schedstat(pid: int) -> tuple[float, int]:
    """Seconds on a CPU and how often it was put there, over all threads that live."""
    seconds, times = 0.0, 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        run, _, slices = (task / "schedstat").read_text().split()
        seconds += int(run) / 1e9
        times += int(slices)
    return seconds, times


def memory(pid: int) -> dict[str, float]:
    """RSS, PSS and USS (private) in MiB."""
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0])
    private = found["Private_Clean"] + found["Private_Dirty"]
    return {"rss": found["Rss"] / 1024, "pss": found["Pss"] / 1024, "uss": private / 1024}


def command_line(pid: int) -> str:
    """The words of a process, or nothing if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def parent(pid: int) -> int:
    """The parent's pid; 0 if the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def alive(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def all_pids() -> list[int]:
    """Every process that this one can see."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def children(pid: int) -> list[int]:
    """Its children, whichever of its threads made them."""
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    except OSError:
        pass  # it has just ended
    return found


def descendants(pid: int) -> list[int]:
    """All below it, it not included."""
    below = children(pid)
    return below + [further for child in below for further in descendants(child)]


# --- figures -------------------------------------------------------------------------------------


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which that part of them lies (nearest rank); nan for none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def median(values: Sequence[float]) -> float:
    """The middle one; nan for none."""
    return quantile(values, 0.5)


def machine() -> dict[str, Any]:
    """What figures depend on."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    kib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1024
    return {
        "processors": os.cpu_count(),
        "model": model,
        "memory_gib": round(kib / 1048576, 1),
        # A vendor's build number tells nobody anything.
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _git(*words: str) -> str:
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), *words]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()


class Result:
    """One benchmark's table with what it depends on; `save` writes it."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name = name
        self._args = args
        self._began = time.monotonic()
        self._machine = machine()
        self.columns: list[str] = []
        self.rows: list[list[Any]] = []
        self.notes: list[str] = []
        self.raw: dict[str, Any] = {}

    def row(self, *cells: Any) -> None:
        """Add a line and show it."""
        self.rows.append(list(cells))
        print(
            "  " + "  ".join(f"{c}: {_cell(v)}" for c, v in zip(self.columns, cells, strict=True))
        )
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Add a sentence to stand below the table, and show it."""
        self.notes.append(text)
        print(f"  {text}", flush=True)

    def save(self, plot: Callable[[Any, dict[str, Any]], None] | None = None) -> Path:
        """Write NAME.json and NAME.png; print the table; the path of the JSON.

        ``plot`` gets a matplotlib figure and the result as it is written.
        """
        settings = {k: v for k, v in vars(self._args).items() if k not in ("seed", "results")}
        result = {
            "name": self.name,
            "commit": _git("rev-parse", "HEAD"),
            "changed": bool(_git("status", "--porcelain", "--", "pkvpn", "benchmarks/*.py")),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": self._args.seed,
            "duration": round(time.monotonic() - self._began, 1),
            "settings": settings,
            "machine": self._machine,
            "table": {"columns": self.columns, "rows": self.rows},
            "notes": self.notes,
            "raw": self.raw,
        }
        folder = Path(self._args.results)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        result = _plain(result)
        text = json.dumps(result, indent=1, default=str, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
        print("\n" + render(result), flush=True)
        if plot is not None:
            _draw(folder / f"{self.name}.png", plot, result)
        return path


def _plain(value: Any) -> Any:
    """The same with null for what is not a number, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value  # noqa: PLR0124


def _draw(path: Path, plot: Callable[[Any, dict[str, Any]], None], result: dict[str, Any]) -> None:
    try:
        from matplotlib.figure import Figure  # a figure without pyplot needs no display
    except ImportError:
        print(f"no plot: matplotlib is not installed ({path.name})")
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    plot(figure, result)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    print(f"{path}")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        if value != value:  # noqa: PLR0124 - not a number: nothing was measured
            return "-"
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def render(result: dict[str, Any]) -> str:
    """A result as Markdown: table, notes, and what it was measured with."""
    table = result["table"]
    lines = ["| " + " | ".join(table["columns"]) + " |", "|" + " --- |" * len(table["columns"])]
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table["rows"]]
    lines.append("")
    lines += [f"- {note}" for note in result["notes"]]
    facts = result["machine"]
    quick = " **A quick run: only shows that the program works.**" if _is_quick(result) else ""
    changed = " with changes" if result["changed"] else ""
    lines.append(
        f"- {result['date'][:10]}, commit {result['commit'][:10]}{changed}, seed {result['seed']}, "
        f"{result['duration']:.0f} s, {facts['processors']} processors ({facts['model']}), "
        f"Linux {facts['kernel']}, Python {facts['python']}.{quick}"
    )
    return "\n".join(lines)


def _is_quick(result: dict[str, Any]) -> bool:
    return bool(result["settings"].get("quick"))


def load_result(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """What a benchmark wrote, or None."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


# --- arguments -----------------------------------------------------------------------------------


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--seed", type=int, default=1, help="of everything left to chance (1)")
    made.add_argument("--quick", action="store_true", help="only see whether the program works")
    made.add_argument(
        "--results", metavar="DIR", help="where JSON and PNG go (benchmarks/results; quick: /tmp)"
    )
    return made


def parse(made: argparse.ArgumentParser, quick: dict[str, Any]) -> argparse.Namespace:
    """Read the arguments; ``quick`` replaces what --quick makes small.  Seeds `random`."""
    args = made.parse_args()
    if args.quick:
        for name, value in quick.items():
            if getattr(args, name) == made.get_default(name):
                setattr(args, name, value)
    if args.results is None:
        folder = Path(tempfile.gettempdir()) / "pkvpn-benchmark-quick"
        args.results = str(folder if args.quick else RESULTS)
    random.seed(args.seed)
    return args
