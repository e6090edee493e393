"""How each fault of the catalogue is made, and undone.

Strategy: a deed is a context manager.  It looks up whatever it needs, says `strike` in the moment
before the first thing goes wrong, and undoes on its way out what does not heal by itself, whatever
happens in between.  Faults inside a child are orders to `injector`; all others are done from
outside with what any process of the same user, or root, may do.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from pkvpn.chaos import injector
from pkvpn.chaos.own_tree import OwnTree, TreeError, wait_until
from pkvpn.chaos.traffic import HUB, PASSWORD, USERS
from pkvpn.client.session import LoginRefused, VpnClient, client_context
from pkvpn.protocol.errors import ProtocolError
from pkvpn.watchdog import procfs
from pkvpn.watchdog.control import ControlError
from pkvpn.watchdog.instance import PID_NAME
from pkvpn.watchdog.journal import JOURNAL_NAME


class Lab(Protocol):
    """What a deed may use."""

    @property
    def tree(self) -> OwnTree: ...

    @property
    def dice(self) -> random.Random: ...

    def strike(self) -> None:
        """To be called when everything is prepared: now it happens."""

    def make_account(self) -> bool:
        """Have the core make one; True: it has acknowledged it, and must never forget it."""

    def violate(self, text: str) -> None:
        """Say that something was not as it must be."""


Deed = Callable[..., AbstractContextManager[None]]

_AGAIN_TIMEOUT = 10.0


def _pids(lab: Lab) -> dict[str, int]:
    """Of all children; another fault may just have ended one of them."""

    def all_there() -> dict[str, int] | None:
        pids = lab.tree.pids()
        return pids if set(lab.tree.children()) <= set(pids) else None

    found = wait_until(all_there, _AGAIN_TIMEOUT, "every child has a process")
    assert found is not None
    return found


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


# --- children


@contextmanager
def _killed(lab: Lab, *names: str) -> Iterator[None]:
    pids = _pids(lab)
    lab.strike()
    for name in names:
        _send(pids[name], signal.SIGKILL)
    yield


@contextmanager
def _killed_again(lab: Lab, name: str, times: int) -> Iterator[None]:
    """Kill it, and each successor as soon as there is one."""
    last = _pids(lab)[name]
    lab.strike()
    _send(last, signal.SIGKILL)
    for _ in range(times):
        before = last

        def successor(before: int = before) -> int:
            pid = lab.tree.pids().get(name, before)
            return 0 if pid == before else pid

        last = wait_until(successor, _AGAIN_TIMEOUT, f"a successor of {name}", every=0.001)
        _send(last, signal.SIGKILL)
    yield


@contextmanager
def _signalled(lab: Lab, name: str, what: str) -> Iterator[None]:
    pids = _pids(lab)
    if name == "children":
        del pids["watchdog"]
    chosen = list(pids.values()) if name in ("all", "children") else [pids[name]]
    lab.strike()
    for pid in chosen:
        _send(pid, signal.Signals[what])
    yield


@contextmanager
def _ordered(lab: Lab, name: str, way: str) -> Iterator[None]:
    lab.strike()
    injector.order(_orders(lab), name, way)
    yield


@contextmanager
def _ordered_at_birth(lab: Lab, name: str, way: str, times: int) -> Iterator[None]:
    injector.order(_orders(lab), name + injector.BIRTH, way, times)
    with _killed_with_standby(lab, name):
        yield


@contextmanager
def _killed_with_standby(lab: Lab, name: str) -> Iterator[None]:
    """Both in one moment, so that a successor must be born."""
    pid, standby = _pids(lab)[name], _standby(lab, name)
    lab.strike()
    _send(standby, signal.SIGKILL)
    _send(pid, signal.SIGKILL)
    yield


@contextmanager
def _standby_hurt(lab: Lab, name: str, what: str, killed: bool) -> Iterator[None]:
    """Send a signal to who stands by for a child; ``killed``: and then its turn comes."""
    pid, standby = _pids(lab)[name], _standby(lab, name)
    lab.strike()
    _send(standby, signal.Signals[what])
    if killed:
        _send(pid, signal.SIGKILL)
    yield


@contextmanager
def _standby_hangs(lab: Lab, name: str) -> Iterator[None]:
    """The next one that is to stand by hangs in its preparations; then its turn comes."""
    order = Path(_orders(lab)) / f"{name}{injector.BIRTH}"
    first = _standby(lab, name)
    injector.order(_orders(lab), order.name, "block")
    _send(first, signal.SIGKILL)
    wait_until(lambda: not order.exists(), 2 * _AGAIN_TIMEOUT, "another one that stands by")
    pid = _pids(lab)[name]
    lab.strike()
    _send(pid, signal.SIGKILL)
    yield


def _standby(lab: Lab, name: str) -> int:
    """Who stands by for a child; there is one some time after the child has come up."""
    watchdog = _pids(lab)["watchdog"]

    def there() -> int:
        for pid in procfs.children_of(watchdog):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0 ")
            if words.endswith(f": {name} standby".encode()):
                return pid
        return 0

    return wait_until(there, _AGAIN_TIMEOUT, f"somebody who stands by for {name}")


@contextmanager
def _ignoring_the_stop(lab: Lab, name: str) -> Iterator[None]:
    injector.order(_orders(lab), name, "ignore-stop")
    wait_until(lambda: not (Path(_orders(lab)) / name).exists(), 5.0, f"{name} ignores")
    lab.strike()
    lab.tree.watchdog("restart", name=name)
    yield


def _orders(lab: Lab) -> str:
    assert lab.tree.orders is not None
    return str(lab.tree.orders)


# --- held by somebody else

_PTRACE_DETACH, _PTRACE_SEIZE, _PTRACE_INTERRUPT = 17, 0x4206, 0x4207
_WALL = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int) -> None:
    if _libc.ptrace(request, pid, None, None) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"ptrace {request:#x} of {pid}: {os.strerror(code)}")


@contextmanager
def _traced(lab: Lab, name: str, killed: bool) -> Iterator[None]:
    pid = _pids(lab)[name]
    lab.strike()
    _ptrace(_PTRACE_SEIZE, pid)
    _ptrace(_PTRACE_INTERRUPT, pid)
    os.waitpid(pid, _WALL)
    if killed:
        _send(pid, signal.SIGKILL)
    try:
        yield
    finally:
        if not killed:
            with contextlib.suppress(OSError):
                _ptrace(_PTRACE_DETACH, pid)
        # The status of a dead one is the tracer's first, and its parent's only after that.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, _WALL | os.WNOHANG)


_GROUPS = Path("/sys/fs/cgroup")


@contextmanager
def _group(kind: str) -> Iterator[Path]:
    """A control group of our own; who is in it at the end goes back to the root."""
    group = _GROUPS / kind / f"pkvpn-chaos-{os.getpid()}-{time.monotonic_ns()}"
    group.mkdir()
    try:
        yield group
    finally:

        def removed() -> bool:
            for member in (group / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    (group.parent / "cgroup.procs").write_text(member)
            group.rmdir()
            return True

        wait_until(removed, 5.0, f"{group} is removed")


def _enter(group: Path, pid: int) -> None:
    (group / "cgroup.procs").write_text(str(pid))


@contextmanager
def _frozen(lab: Lab, names: Sequence[str], killed: bool) -> Iterator[None]:
    with _group("freezer") as group:
        pids = _pids(lab)
        for name in names:
            _enter(group, pids[name])
        state = group / "freezer.state"
        lab.strike()
        state.write_text("FROZEN")
        try:
            wait_until(lambda: state.read_text() == "FROZEN\n", 5.0, "the freeze")
            if killed:
                _send(pids[names[0]], signal.SIGKILL)
            yield
            if killed and lab.tree.pids().get(names[0]) not in (None, pids[names[0]]):
                lab.violate(f"a second {names[0]} before the first one could end")
        finally:
            state.write_text("THAWED")


@contextmanager
def _starved(lab: Lab, name: str) -> Iterator[None]:
    """It runs only when nobody else wants to, and others want to all the time."""
    pid = _pids(lab)[name]
    os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
    hogs: list[subprocess.Popen[bytes]] = []
    try:
        lab.strike()
        for cpu in os.sched_getaffinity(0):
            code = f"import os; os.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"
            hogs.append(subprocess.Popen([sys.executable, "-c", code]))
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
        with contextlib.suppress(ProcessLookupError):
            os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))


# --- the watchdog


@contextmanager
def _watchdog_paused(lab: Lab, name: str = "", what: str = "") -> Iterator[None]:
    pids = _pids(lab)
    lab.strike()
    os.kill(pids["watchdog"], signal.SIGSTOP)
    try:
        if what == "kill":
            _send(pids[name], signal.SIGKILL)
        elif what:
            injector.order(_orders(lab), name, what)
        yield
    finally:
        os.kill(pids["watchdog"], signal.SIGCONT)


@contextmanager
def _watchdog_killed(lab: Lab, moment: str) -> Iterator[None]:
    tree, pids = lab.tree, _pids(lab)
    victim = pids["watchdog"]
    if moment == "start":
        tree.stop()
        process = tree.spawn()
        time.sleep(lab.dice.uniform(0.05, 0.6))
        lab.strike()
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        wait_until(lambda: not tree.holders(), 2.0, "the whole tree is gone")
    else:
        lab.strike()
        if moment == "respawn":
            _send(pids["core"], signal.SIGKILL)
            time.sleep(lab.dice.uniform(0.0, 0.02))
        elif moment == "stop":
            os.kill(victim, signal.SIGTERM)
            time.sleep(lab.dice.uniform(0.0, 0.1))
        elif moment == "upgrade":
            tree.watchdog("upgrade")
            time.sleep(lab.dice.uniform(0.1, 1.0))
        os.kill(victim, signal.SIGKILL)
        if moment == "unreaped":
            zombie = tree.abandon()
            wait_until(lambda: not tree.holders(), 2.0, "the whole tree is gone")
            tree.start()
            zombie.wait()
            yield
            return
        tree.wait_end()
    yield
    tree.start()


@contextmanager
def _killed_in_fork(lab: Lab) -> Iterator[None]:
    """The new child is kept in its first system call until its parent is dead."""
    tree, pids = lab.tree, _pids(lab)
    command = ["strace", "-f", "-q", "-o", "/dev/null", "-e", "trace=prctl"]
    command += ["-e", "inject=prctl:delay_enter=500000", "-p", str(pids["watchdog"])]
    tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        status = Path(f"/proc/{pids['watchdog']}/status")
        wait_until(lambda: f"TracerPid:\t{tracer.pid}\n" in status.read_text(), 5.0, "strace")
        lab.strike()
        _send(pids["core"], signal.SIGKILL)
        children = Path(f"/proc/{pids['watchdog']}/task/{pids['watchdog']}/children")
        known = {str(pid) for pid in pids.values()}
        wait_until(lambda: set(children.read_text().split()) - known, 5.0, "a new core")
        os.kill(pids["watchdog"], signal.SIGKILL)
        tree.wait_end()
    finally:
        tracer.terminate()
        tracer.wait()
    yield
    tree.start()


@contextmanager
def _everything_killed(lab: Lab, order: str = "") -> Iterator[None]:
    pids = _pids(lab)
    watchdog = pids.pop("watchdog")
    lab.strike()
    if order:
        _send(pids["core"], signal.SIGKILL)
        time.sleep(lab.dice.uniform(0.0, 0.2))
    else:
        for pid in pids.values():
            _send(pid, signal.SIGKILL)
    os.kill(watchdog, signal.SIGKILL)
    lab.tree.wait_end()
    yield
    lab.tree.start()


@contextmanager
def _stopped_by(lab: Lab, name: str, times: int) -> Iterator[None]:
    pid = _pids(lab)[name]
    lab.strike()
    for _ in range(times):
        _send(pid, signal.SIGTERM)
    code = lab.tree.wait_end()
    if code:
        lab.violate(f"a stop by TERM to {name} ended with exit code {code}")
    yield
    lab.tree.start()


@contextmanager
def _watchdog_bug(lab: Lab, where: str, victim: str = "") -> Iterator[None]:
    pids = _pids(lab)
    lab.strike()
    injector.order_bug(_orders(lab), injector.POLICY if where == "policy" else injector.LOOP)
    if victim:
        _send(pids[victim], signal.SIGKILL)
    yield


# --- resources


@contextmanager
def _limited(
    lab: Lab, name: str, what: str, value: int, victim: str = "", for_good: bool = False
) -> Iterator[None]:
    """Lower a limit of a process, and kill another one meanwhile."""
    pids = _pids(lab)
    number = getattr(resource, f"RLIMIT_{what}")
    before = resource.prlimit(pids[name], number)
    lab.strike()
    resource.prlimit(pids[name], number, (value, before[1]))
    if victim:
        _send(pids[victim], signal.SIGKILL)
    try:
        yield
    finally:
        if not for_good:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pids[name], number, before)


@contextmanager
def _limited_and_ordered(lab: Lab, name: str, what: str, way: str) -> Iterator[None]:
    size = int(Path(f"/proc/{_pids(lab)[name]}/statm").read_text().split()[0])
    value = size * resource.getpagesize() + (64 << 20)
    with _limited(lab, name, what, value, for_good=True):
        injector.order(_orders(lab), name, way)
        yield


@contextmanager
def _no_processes(lab: Lab, victim: str) -> Iterator[None]:
    pids = _pids(lab)
    with _group("pids") as group:
        _enter(group, pids["watchdog"])
        limit = group / "pids.max"
        limit.write_text("1")
        lab.strike()
        _send(pids[victim], signal.SIGKILL)
        try:
            yield
        finally:
            limit.write_text("max")


@contextmanager
def _out_of_memory(lab: Lab, name: str) -> Iterator[None]:
    pid = _pids(lab)[name]
    with _group("memory") as group:
        (group / "memory.limit_in_bytes").write_text(str(48 << 20))
        _enter(group, pid)
        lab.strike()
        injector.order(_orders(lab), name, "grow")
        yield
        wait_until(lambda: lab.tree.pids().get(name) != pid, 10.0, f"a successor of {name}")


@contextmanager
def _database_full(lab: Lab) -> Iterator[None]:
    """What cannot be written is not acknowledged, and can be made afterwards."""
    with _limited(lab, "core", "FSIZE", 0):
        if lab.make_account():
            lab.violate("an account was acknowledged although nothing could be written")
        yield
    if not lab.make_account():
        lab.violate("no account could be made after the disk had room again")


@contextmanager
def _logs_removed(lab: Lab, victim: str) -> Iterator[None]:
    pids = _pids(lab)
    lab.strike()
    for path in lab.tree.state.iterdir():
        if path.name == "crashes":
            shutil.rmtree(path)
        elif path.name.startswith((JOURNAL_NAME, "pkvpn.log")):
            path.unlink()
    _send(pids[victim], signal.SIGKILL)
    yield


@contextmanager
def _killed_in_writes(lab: Lab, name: str) -> Iterator[None]:
    pid = _pids(lab)[name]
    lab.make_account()
    lab.strike()
    for number in range(10):
        if number == 3:
            _send(pid, signal.SIGKILL)
        lab.make_account()
    yield


@contextmanager
def _runtime_cleared(lab: Lab) -> Iterator[None]:
    lab.strike()
    for path in lab.tree.runtime.iterdir():
        path.unlink()
    yield
    lab.tree.stop()
    lab.tree.start()


@contextmanager
def _port_contended(lab: Lab) -> Iterator[None]:
    pids = _pids(lab)
    lab.strike()
    _send(pids["core"], signal.SIGKILL)
    _send(pids["edge-1"], signal.SIGKILL)
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", lab.tree.port))
                sock.listen()
                lab.violate("another program got the port")
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        time.sleep(0.001)
    yield


# --- starts


@contextmanager
def _second_starts(lab: Lab, count: int) -> Iterator[None]:
    pid = _pids(lab)["watchdog"]
    lab.strike()
    for _ in range(count):
        process, answer = lab.tree.launch()
        code = process.wait(10.0)
        if (answer, code) != ({"already": pid}, 0):
            lab.violate(f"a second start said {answer} and ended with {code}")
    yield


@contextmanager
def _start_race(lab: Lab, count: int) -> Iterator[None]:
    lab.tree.stop()
    lab.strike()
    racers = [lab.tree.spawn() for _ in range(count)]
    answers = []
    for racer in racers:
        assert racer.stdout is not None
        with racer.stdout as said:
            line = b'{"progress": ""}'
            while "progress" in json.loads(line):
                line = said.readline()
        answers.append(json.loads(line))
    winners = [racer for racer, said in zip(racers, answers, strict=True) if "ready" in said]
    for racer in racers:
        if racer not in winners:
            racer.wait(10.0)
    if len(winners) != 1 or not all({"ready", "already"} & set(said) for said in answers):
        lab.violate(f"{count} starts at once said {answers}")
    yield
    for winner in winners:
        winner.terminate()
        winner.wait(20.0)
    lab.tree.start()


@contextmanager
def _start_while_stopping(lab: Lab) -> Iterator[None]:
    pid = _pids(lab)["watchdog"]
    lab.strike()
    os.kill(pid, signal.SIGTERM)
    process, answer = lab.tree.launch()
    if answer.get("ready"):  # it has waited for the end of the last one
        process.send_signal(signal.SIGTERM)
    elif answer != {"already": pid}:
        lab.violate(f"a start while the last tree stops said {answer}")
    process.wait(20.0)
    lab.tree.wait_end()
    yield
    lab.tree.start()


@contextmanager
def _start_refused(lab: Lab) -> Iterator[None]:
    tree = lab.tree
    tree.stop()
    settings = tree.settings
    tree.settings = f"{settings}[edge]\nno_such_key = 1\n"
    lab.strike()
    try:
        process, answer = tree.launch()
        if process.wait(10.0) == 0 or answer:
            lab.violate(f"a start with a wrong configuration said {answer}")
    finally:
        tree.settings = settings
    yield
    tree.start()


@contextmanager
def _left_behind(lab: Lab, what: str) -> Iterator[None]:
    """What a crash of the machine may leave; nobody may come to harm by it."""
    tree = lab.tree
    pid_file = tree.runtime / PID_NAME
    named = pid_file.read_text(encoding="utf-8")
    with _everything_killed_and_left(lab):
        pass
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        if what == "pid":
            words = named.split(" ", 1)
            rest = f" {words[1]}" if len(words) > 1 else "\n"
            pid_file.write_text(f"{bystander.pid}{rest}", encoding="utf-8")
        else:
            pid_file.write_bytes(os.urandom(100))
            with (tree.state / JOURNAL_NAME).open("ab") as journal:
                journal.write(b'{"at": "2026-01-')
        yield
        tree.start()
        if bystander.poll() is not None:
            lab.violate("a start killed a process that only stood in an old pid file")
    finally:
        bystander.kill()
        bystander.wait()


@contextmanager
def _everything_killed_and_left(lab: Lab) -> Iterator[None]:
    pids = _pids(lab)
    lab.strike()
    for pid in pids.values():
        _send(pid, signal.SIGKILL)
    lab.tree.wait_end()
    yield


_BARE = """umask 0; d=$(mktemp -d); cd "$d"; rmdir "$d"
exec env -i LC_ALL=xx_YY PYTHONPATH="$PYTHONPATH" "$@"
"""


@contextmanager
def _started_oddly(lab: Lab, how: str) -> Iterator[None]:
    tree = lab.tree
    tree.stop()
    prefix: dict[str, tuple[str, ...]] = {
        "stdio": ("sh", "-c", 'exec "$@" <&- 2>&-', "sh"),
        "signals": (
            "env", "--ignore-signal=CHLD,TERM,HUP,INT,QUIT,PIPE",
            "--block-signal=CHLD,TERM,HUP,INT,QUIT",
        ),
        "bare": ("sh", "-c", _BARE, "sh"),
    }  # fmt: skip
    lab.strike()
    tree.start(prefix=prefix[how])
    yield
    # It must also hear of its end as any other.
    tree.stop()
    tree.start()


# --- the operator


@contextmanager
def _asked(lab: Lab, verb: str, name: str = "", victim: str = "") -> Iterator[None]:
    pids = _pids(lab)
    lab.strike()
    if victim:
        _send(pids[victim], signal.SIGKILL)
    lab.tree.watchdog(verb, **({"name": name} if name else {}))
    yield


@contextmanager
def _wrong_reload(lab: Lab) -> Iterator[None]:
    tree = lab.tree
    right = tree.settings
    tree.settings = f"{right}[edge]\nno_such_key = 1\n"
    tree.write_config()
    try:
        lab.strike()
        try:
            tree.watchdog("reload")
            lab.violate("a wrong configuration was taken")
        except ControlError as error:
            if "no_such_key" not in str(error):
                lab.violate(f"the refusal of a wrong configuration does not name it: {error}")
        yield
    finally:
        tree.settings = right
        tree.write_config()


@contextmanager
def _upgraded(lab: Lab, to: str) -> Iterator[None]:
    tree, pids = lab.tree, _pids(lab)
    module = tree.code / "pkvpn" / "core" / "main.py"
    right = module.read_text(encoding="utf-8")
    wrong = {
        "broken": f"{right}\nraise RuntimeError('chaos: this code does not start')\n",
        "bad core": f"{right}\n\ndef main(*_: object) -> None:\n    raise SystemExit('chaos')\n",
    }
    try:
        module.write_text(wrong.get(to, right), encoding="utf-8")
        image = tree.status()["watchdog"]["image"]
        lab.strike()
        tree.watchdog("upgrade")
        if to == "killed":
            wait_until(lambda: tree.status()["watchdog"]["image"] != image, 30.0, "a new image")
            _send(pids["core"], signal.SIGKILL)
            _send(pids["edge-1"], signal.SIGKILL)
        wait_until(
            lambda: tree.status()["watchdog"]["upgrade"] not in ("trying", "replacing children"),
            60.0, "the upgrade is over",
        )  # fmt: skip
        yield
    finally:
        module.write_text(right, encoding="utf-8")


# --- who knocks


@contextmanager
def _rubbish(lab: Lab, count: int) -> Iterator[None]:
    context = client_context()
    lab.strike()
    for number in range(count):
        plain = socket.create_connection(("127.0.0.1", lab.tree.port), 5.0)
        with contextlib.suppress(OSError, ssl.SSLError), plain:
            plain.settimeout(0.2)
            if number % 3 == 0:
                plain.sendall(lab.dice.randbytes(2000))
            elif number % 3 == 1:
                plain.sendall(b"\x16\x03\x01\x02\x00\x01\x00" + lab.dice.randbytes(300))
            else:
                with context.wrap_socket(plain, server_hostname="chaos") as tls:
                    tls.sendall(lab.dice.choice(_WRONG_WORDS))
                    tls.recv(1000)
    yield


_WRONG_WORDS = (
    b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 3000,
    b"POST /vpnsvc/vpn.cgi HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n",
    b"POST /vpnsvc/connect.cgi HTTP/1.1\r\nContent-Length: 7\r\n\r\nVPNCONN\x00\x01\x02",
    bytes(range(256)) * 20,
)


@contextmanager
def _slow_peers(lab: Lab, count: int) -> Iterator[None]:
    lab.strike()
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            # From addresses of their own: one has a limit.
            stack.enter_context(
                socket.create_connection(
                    ("127.0.0.1", lab.tree.port), 5.0,
                    source_address=(f"127.0.1.{lab.dice.randrange(1, 250)}", 0),
                )
            )  # fmt: skip
        yield


@contextmanager
def _wrong_passwords(lab: Lab, count: int) -> Iterator[None]:
    lab.strike()
    for number in range(count):
        client = VpnClient(
            "127.0.0.1", lab.tree.port, HUB, USERS[number % 2], "no", reconnect=False
        )
        try:
            client.connect(5.0)
            lab.violate("a wrong password was taken")
        except LoginRefused:
            pass
        finally:
            client.close()
    yield


@contextmanager
def _login_storm(lab: Lab, count: int, victim: str = "") -> Iterator[None]:
    """All at once; whoever is cut off by the death of a child tries again, as clients do."""
    pids = _pids(lab)
    lab.strike()
    clients = [
        VpnClient("127.0.0.1", lab.tree.port, HUB, USERS[number % 2], PASSWORD)
        for number in range(count)
    ]
    began = time.monotonic()
    try:
        while not all(client.logins for client in clients):
            for client in clients:
                client.handle()
            now = time.monotonic()
            if victim and now - began > 0.2:
                _send(pids[victim], signal.SIGKILL)
                victim = ""
            if now - began > 30.0:
                missing = [client for client in clients if not client.logins]
                lab.violate(f"{len(missing)} of {count} never got in: {missing[0].error}")
                break
            time.sleep(0.001)
        yield
    except (OSError, ProtocolError, LoginRefused) as error:
        raise TreeError(f"a login storm failed: {error}") from error
    finally:
        for client in clients:
            client.close()


DEEDS: dict[str, Deed] = {
    "asked": _asked,
    "database_full": _database_full,
    "everything_killed": _everything_killed,
    "frozen": _frozen,
    "ignoring_the_stop": _ignoring_the_stop,
    "killed": _killed,
    "killed_again": _killed_again,
    "killed_in_fork": _killed_in_fork,
    "killed_with_standby": _killed_with_standby,
    "standby_hangs": _standby_hangs,
    "standby_hurt": _standby_hurt,
    "killed_in_writes": _killed_in_writes,
    "left_behind": _left_behind,
    "limited": _limited,
    "limited_and_ordered": _limited_and_ordered,
    "login_storm": _login_storm,
    "logs_removed": _logs_removed,
    "no_processes": _no_processes,
    "ordered": _ordered,
    "ordered_at_birth": _ordered_at_birth,
    "out_of_memory": _out_of_memory,
    "port_contended": _port_contended,
    "rubbish": _rubbish,
    "runtime_cleared": _runtime_cleared,
    "second_starts": _second_starts,
    "signalled": _signalled,
    "slow_peers": _slow_peers,
    "start_race": _start_race,
    "start_refused": _start_refused,
    "start_while_stopping": _start_while_stopping,
    "started_oddly": _started_oddly,
    "starved": _starved,
    "stopped_by": _stopped_by,
    "traced": _traced,
    "upgraded": _upgraded,
    "watchdog_bug": _watchdog_bug,
    "watchdog_killed": _watchdog_killed,
    "watchdog_paused": _watchdog_paused,
    "wrong_passwords": _wrong_passwords,
    "wrong_reload": _wrong_reload,
}


# --- what it takes


def _can_group(kind: str) -> str:
    place = _GROUPS / kind
    if not (place / "cgroup.procs").exists():
        return f"no control group {kind} (version 1)"
    return "" if os.access(place, os.W_OK) else f"no right to make a control group {kind}"


def _can_trace() -> str:
    victim = subprocess.Popen(["sleep", "10"])
    try:
        _ptrace(_PTRACE_SEIZE, victim.pid)
    except OSError as error:
        return f"no process can be traced: {error.strerror}"
    finally:
        victim.kill()
        victim.wait()
    # Those of our own tree descend from us, which is what yama's first level asks for.
    return ""


# What a fault may need -> why it is not there, or nothing.
NEEDS: dict[str, Callable[[], str]] = {
    "root": lambda: "" if os.geteuid() == 0 else "not root",
    "freezer": lambda: _can_group("freezer"),
    "memory": lambda: _can_group("memory"),
    "pids": lambda: _can_group("pids"),
    "ptrace": _can_trace,
    "strace": lambda: _can_trace() if shutil.which("strace") else "no strace",
}
