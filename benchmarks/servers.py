"""The servers under test: ours and SoftEther's own, started the same way, in a laboratory.

Strategy: pids are asked for once, before anything is measured; a kill is then one system call of
the measuring process.  Both may stand in a named network namespace; each has directories of its
own.  Hub `T` with the users `u1` to `uN`, passwords `pw1` to `pwN`, is on both.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path

from benchmarks.common import (
    ROOT,
    all_pids,
    children,
    command_line,
    cpu_seconds,
    parent,
    wait_until,
)
from pkvpn.watchdog.control import ask

HUB = "T"
STOCK_SERVER = "/usr/libexec/softether/vpnserver/vpnserver"

# vpncmd spins for ever at a prompt without input, so it is always bounded.
VPNCMD = ("timeout", "60", "vpncmd")

# Where the stock programs keep their state, which they share unless each has its own mounts.
PRIVATE = ("/run/softether", "/var/lib/softether", "/var/log/softether")


def private_mounts() -> str:
    """Shell lines that give the rest of a script its own state of the stock programs."""
    return "set -e\n" + "".join(
        f"mkdir -p {path}; mount -t tmpfs none {path}\n" for path in PRIVATE
    )


def in_namespace(namespace: str | None) -> list[str]:
    """Words in front of a command that is to run in a network namespace."""
    return [] if namespace is None else ["nsenter", f"--net=/run/netns/{namespace}"]


class Server(ABC):
    """A VPN server that can be started, asked for its pids and stopped."""

    name: str

    @abstractmethod
    def start(self, users: int = 2) -> float:
        """Start it, with its hub and users; the seconds that the start command took."""

    @abstractmethod
    def stop(self) -> float:
        """Stop it; the seconds that the stop command took."""

    @abstractmethod
    def pids(self) -> list[int]:
        """All its processes, the watchdog first."""

    def cpu(self) -> float:
        """CPU seconds of the whole tree, children that died and were reaped included."""
        root, *others = self.pids()
        total = cpu_seconds(root, reaped=True)
        for pid in others:
            try:
                total += cpu_seconds(pid)
            except OSError:
                continue  # it died between the two lines; its parent will count it
        return total


class Ours(Server):
    """pkvpn of this checkout."""

    def __init__(
        self,
        directory: Path,
        *,
        namespace: str | None = None,
        listen: tuple[str, ...] = ("127.0.0.1:443",),
        extra: str = "",
    ) -> None:
        """``extra``: more sections of the configuration, TOML."""
        self.name = "pkvpn"
        self._namespace = namespace
        self._directory = directory / "pkvpn"
        self._directory.mkdir(mode=0o755)
        self._config = self._directory / "config.toml"
        self._runtime = self._directory / "run"
        addresses = ", ".join(f'"{address}"' for address in listen)
        self._config.write_text(
            f"[service]\nlisten = [{addresses}]\n"
            f'state_dir = "{self._directory}/state"\nruntime_dir = "{self._runtime}"\n\n{extra}',
            encoding="utf-8",
        )

    def cli(self, *words: str, feed: str = "", timeout: float = 60.0) -> str:
        """Run one verb; what it printed."""
        command = [*in_namespace(self._namespace), sys.executable, "-m", "pkvpn"]
        command += ["--config", str(self._config), *words]
        done = subprocess.run(
            command, cwd=ROOT, input=feed, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stdout}{done.stderr}".strip())
        return done.stdout

    def start(self, users: int = 2) -> float:
        at = time.monotonic()
        self.cli("start")
        took = time.monotonic() - at
        admin = str(self._runtime / "admin.sock")
        if HUB not in {hub["name"] for hub in ask(admin, "hub.list")}:
            ask(admin, "hub.add", {"name": HUB})
            for number in range(1, users + 1):
                user = {"hub": HUB, "name": f"u{number}", "password": f"pw{number}"}
                ask(admin, "user.add", {**user, "auth": "password"})
        return took

    def stop(self) -> float:
        at = time.monotonic()
        self.cli("stop")
        return time.monotonic() - at

    def pids(self) -> list[int]:
        named = self.named_pids()
        return [named.pop("watchdog"), *named.values()]

    def named_pids(self) -> dict[str, int]:
        """Name of a child, or "watchdog", -> its pid at this moment."""
        status = ask(str(self._runtime / "control.sock"), "status")
        found = {"watchdog": int(status["watchdog"]["pid"])}
        return found | {c["name"]: int(c["pid"]) for c in status["children"] if c["pid"]}

    def restarts(self) -> dict[str, int]:
        """Name of a child -> how often it was started again."""
        status = ask(str(self._runtime / "control.sock"), "status")
        return {c["name"]: int(c["restarts"]) for c in status["children"]}

    def ask(self, verb: str, timeout: float = 60.0, **args: object) -> object:
        """Ask the watchdog, without a program start in between."""
        return ask(str(self._runtime / "control.sock"), verb, args, timeout=timeout)

    @property
    def log(self) -> Path:
        """Its log, for when something goes wrong."""
        return self._directory / "state" / "pkvpn.log"


class SoftEther(Server):
    """SoftEther's own server of Debian."""

    def __init__(
        self,
        directory: Path,
        *,
        namespace: str | None = None,
        udp_acceleration: bool = True,
        ready: str = "",
    ) -> None:
        """``ready``: further lines for its administration program."""
        self.name = "SoftEther" if udp_acceleration else "SoftEther, TCP only"
        self._namespace = namespace
        self._directory = directory / f"softether-{int(udp_acceleration)}"
        self._directory.mkdir()
        self._extra = ready if udp_acceleration else (
            "ExtOptionSet DisableUdpAcceleration /VALUE:1\n" + ready
        )  # fmt: skip
        self._holder: subprocess.Popen[bytes] | None = None
        self._root = 0

    def start(self, users: int = 2) -> float:
        commands = self._directory / "commands"
        lines = ["ServerPasswordSet admin", f"HubCreate {HUB} /PASSWORD:hub", f"Hub {HUB}"]
        for i in range(1, users + 1):
            lines.append(f"UserCreate u{i} /GROUP:none /REALNAME:none /NOTE:none")
            lines.append(f"UserPasswordSet u{i} /PASSWORD:pw{i}")
        commands.write_text("\n".join(lines) + "\n" + self._extra + "Flush\n", encoding="utf-8")
        ready, took = self._directory / "ready", self._directory / "took"
        before = set(self._found())
        script = (
            f"{private_mounts()}a=$(date +%s%N)\n"
            f"{STOCK_SERVER} start </dev/null >/dev/null\n"
            f"echo $(( $(date +%s%N) - a )) >{took}\n"
            # It says that it has started some time before it can be administered.
            "for k in $(seq 40); do\n"
            f"  {' '.join(VPNCMD)} localhost:443 /SERVER /IN:{commands} </dev/null"
            f" >{self._directory}/log 2>&1 && break\n  sleep 0.5\ndone\n"
            # The shell keeps the mounts in sight until its input ends.
            f"touch {ready}\nread line || true\n{STOCK_SERVER} stop </dev/null >/dev/null\n"
        )
        command = [*in_namespace(self._namespace), "unshare", "--mount"]
        command += ["--propagation", "private", "sh", "-c", script]
        self._holder = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(ready.exists, 60 + users / 10, f"{self.name} starts (see {self._directory})")
        new = [pid for pid in self._found() if pid not in before]
        self._root = next(pid for pid in new if parent(pid) not in new)
        return int(took.read_text()) / 1e9

    def _found(self) -> list[int]:
        return [pid for pid in all_pids() if "vpnserver execsvc" in command_line(pid)]

    def stop(self) -> float:
        assert self._holder is not None
        at = time.monotonic()
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait(60)
        return time.monotonic() - at

    def pids(self) -> list[int]:
        return [self._root, *children(self._root)]

    def core(self) -> int:
        """The child of its execsvc, which does the work; 0 while there is none."""
        return next(iter(children(self._root)), 0)

    def log_lines(self) -> str:
        """What its administration program said."""
        path = self._directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""


def kill_quietly(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
