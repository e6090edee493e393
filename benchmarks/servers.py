"""The servers under test: ours and SoftEther's own, started the same way, in a laboratory.

Strategy: pids are asked for before anything is measured, so a kill is one system call of the
measuring process.  Both may stand on a host of a bed; each has directories of its own.  Hub `T`
with the users `u1` to `uN`, passwords `pw1` to `pwN`, is on both.
"""

from __future__ import annotations

import os
import subprocess
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from benchmarks.common import (
    all_pids,
    children,
    command_line,
    cpu_seconds,
    descendants,
    parent,
    wait_until,
)
from tests.system.bed import ChaoticService, Host, Service

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

    def cpu_by_process(self) -> dict[str, float]:
        """The same by the names that its processes have, if they have any."""
        return {}


class Ours(Server):
    """pkvpn of this checkout."""

    def __init__(
        self,
        directory: Path,
        *,
        host: Host | None = None,
        listen: tuple[str, ...] = ("127.0.0.1:443",),
        extra: str = "",
        service: type[Service] = Service,
    ) -> None:
        """``extra``: more sections of the configuration, TOML."""
        self.name = "pkvpn"
        addresses = ", ".join(f'"{address}"' for address in listen)
        config = f"listen = [{addresses}]\n\n{extra}"
        self.service = service(directory / "pkvpn", config, host)

    def start(self, users: int = 2) -> float:
        at = time.monotonic()
        self._start()
        took = time.monotonic() - at
        if HUB not in {hub["name"] for hub in self.service.ask("hub.list")}:
            self.service.add_hub(HUB, **{f"u{i}": f"pw{i}" for i in range(1, users + 1)})
        return took

    def _start(self) -> None:
        self.service.cli("start")

    def stop(self) -> float:
        at = time.monotonic()
        self.service.cli("stop")
        return time.monotonic() - at

    def pids(self) -> list[int]:
        watchdog = self.named_pids()["watchdog"]
        return [watchdog, *descendants(watchdog)]  # with successors that were forked ahead

    def cpu_by_process(self) -> dict[str, float]:
        return {name: cpu_seconds(pid) for name, pid in self.named_pids().items()}

    def named_pids(self) -> dict[str, int]:
        """Name of a child, or "watchdog", -> its pid at this moment."""
        status = self.service.watchdog("status")
        found = {"watchdog": int(status["watchdog"]["pid"])}
        return found | {c["name"]: int(c["pid"]) for c in status["children"] if c["pid"]}

    def restarts(self) -> dict[str, int]:
        """Name of a child -> how often it was started again."""
        return {name: int(one["restarts"]) for name, one in self.service.children().items()}

    def settled(self) -> bool:
        """Are all children up?"""
        return all(one["state"] == "up" for one in self.service.children().values())


class Wrapped(Ours):
    """The same in the foreground, with children that go wrong on request."""

    def __init__(self, directory: Path, **more: Any) -> None:
        super().__init__(directory, **more, service=ChaoticService)

    @property
    def orders(self) -> Path:
        assert isinstance(self.service, ChaoticService)
        return self.service.orders

    def _start(self) -> None:
        self.service.start()

    def stop(self) -> float:
        at = time.monotonic()
        self.service.stop()
        return time.monotonic() - at


class SoftEther(Server):
    """SoftEther's own server of Debian."""

    def __init__(
        self,
        directory: Path,
        *,
        host: Host | None = None,
        udp_acceleration: bool = True,
        ready: str = "",
    ) -> None:
        """``ready``: further lines for its administration program."""
        self.name = "SoftEther" if udp_acceleration else "SoftEther, TCP only"
        self._host = host
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
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
        if self._host is not None:
            command = self._host.beside(*command)
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
