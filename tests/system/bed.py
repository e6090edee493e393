"""Stock clients around a server of ours, on cables that nothing else hangs on.

Strategy: every host is a process that holds its namespaces and nothing else: when it dies, and it
dies with the test run at the latest, the kernel takes its interfaces away, and of a stock client
every process as well (it has a pid namespace too).  So nothing has a name outside, two beds never
meet, and nothing is left.  The stock programs see empty directories where they would keep state.
Every command has a limit: `vpncmd` at a question nobody answers spins for ever.

    server (10.99.0.1) --- switch "lan" --- client 1 (10.99.0.11)
                                        \\-- client 2 (10.99.0.12)

The clients' virtual adapters get 10.77.0.1 and 10.77.0.2.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from pkvpn.watchdog import control
from tests.support import eventually

ROOT = Path(__file__).resolve().parents[2]
VPNCLIENT = "/usr/libexec/softether/vpnclient/vpnclient"
COMMAND_TIMEOUT = 20.0

# Where the stock programs keep configuration, logs and sockets.
_PRIVATE = ("/run/softether", "/var/lib/softether", "/var/log/softether")

PASSWORDS = {"u1": "pw1", "u2": "pw2"}


def run(*command: str, stdin: str = "", timeout: float = COMMAND_TIMEOUT) -> str:
    """The output of a command; AssertionError with all it said if it fails."""
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, (
        f"{' '.join(command)}: {done.returncode}: {done.stdout}{done.stderr}"
    )
    return done.stdout


class Host:
    """A machine of its own, as far as the network goes.  ``whole``: pids and mounts too."""

    def __init__(self, *, whole: bool = False) -> None:
        self._whole = whole
        kinds = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        # The last process says that the namespaces are there, and waits.
        script = "echo there; exec sleep infinity"
        if whole:
            mounts = [f"mkdir -p {path}; mount -t tmpfs none {path}" for path in _PRIVATE]
            script = "; ".join(["set -e", *mounts, script])
        self._holder = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL"),
                *("unshare", *(kinds if whole else kinds[:1])),
                *("sh", "-c", script),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        with self._holder.stdout as said:
            assert said.readline() == b"there\n"
        self.pid = self._holder.pid
        if whole:
            (child,) = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            self.pid = int(child)
        self.run("ip", "link", "set", "lo", "up")

    def enter(self, *command: str) -> list[str]:
        """The command line that runs a command on this host."""
        kinds = ["--net", "--mount", "--pid"] if self._whole else ["--net"]
        return ["nsenter", "--target", str(self.pid), *kinds, "--", *command]

    def beside(self, *command: str) -> list[str]:
        """The same with this host's network only: files and pids are those of the test."""
        return ["nsenter", "--target", str(self.pid), "--net", "--", *command]

    def run(self, *command: str, timeout: float = COMMAND_TIMEOUT) -> str:
        return run(*self.enter(*command), timeout=timeout)

    def start(self, *command: str, **more: Any) -> subprocess.Popen[str]:
        """A process with this host's network, that ends with the test run at the latest."""
        return subprocess.Popen(
            self.beside("setpriv", "--pdeathsig", "KILL", *command),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=ROOT, **more,
        )  # fmt: skip

    def device(self, name: str) -> dict[str, Any]:
        """What the system says of a network device, statistics included."""
        (found,) = json.loads(self.run("ip", "-j", "-d", "-s", "addr", "show", "dev", name))
        assert isinstance(found, dict)
        return found

    def received(self, name: str) -> int:
        """How many bytes a device has brought so far."""
        for line in Path(f"/proc/{self.pid}/net/dev").read_text().splitlines():
            device, _, figures = line.partition(":")
            if device.strip() == name:
                return int(figures.split()[0])
        raise AssertionError(f"there is no device {name}")

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()


class StockClient(Host):
    """SoftEther's client, with one adapter and the account of one user."""

    def __init__(self, number: int) -> None:
        super().__init__(whole=True)
        self.number = number
        self.user = f"u{number}"
        self.account = f"a{number}"
        self.adapter = f"vpn_vpn{number}"
        self.address = f"10.77.0.{number}"

    def begin(self, server: str, hub: str) -> None:
        """Start the program and have it log in; `wait_established` sees the end of that."""
        self.run(VPNCLIENT, "start")
        eventually(lambda: self.command("VersionGet"), within=15.0, every=0.1)
        self.command(f"NicCreate vpn{self.number}")
        self.add_account(self.account, server, hub, self.user, f"vpn{self.number}")
        self.command(
            f"AccountPasswordSet {self.account} /PASSWORD:{PASSWORDS[self.user]} /TYPE:standard"
        )
        self.command(f"AccountRetrySet {self.account} /NUM:999 /INTERVAL:5")
        self.command(f"AccountConnect {self.account}")
        self.run("ip", "addr", "add", f"{self.address}/24", "dev", self.adapter)
        self.run("ip", "link", "set", self.adapter, "up")

    def add_account(self, name: str, server: str, hub: str, user: str, nic: str) -> None:
        self.command(
            f"AccountCreate {name} /SERVER:{server} /HUB:{hub} /USERNAME:{user} /NICNAME:{nic}"
        )

    def command(self, line: str) -> str:
        """What `vpncmd` says to one line."""
        return self.run("timeout", "15", "vpncmd", "localhost", "/CLIENT", "/CMD", *line.split())

    def status(self, account: str = "") -> dict[str, str]:
        """The client's own view of its connection; empty while it is not connected."""
        try:
            text = self.command(f"AccountStatusGet {account or self.account}")
        except AssertionError:
            return {}
        rows = (line.partition("|") for line in text.splitlines() if "|" in line)
        return {key.strip(): value.strip() for key, _, value in rows}

    def wait_established(self, account: str = "", within: float = 30.0) -> dict[str, str]:
        def status() -> dict[str, str]:
            now = self.status(account)
            assert "Session Established" in now.get("Session Status", ""), now
            return now

        return eventually(status, within=within, every=0.1)

    def established_sessions(self) -> int:
        """How often this connection of the user's has had to log in."""
        return int(re.sub(r"\D", "", self.status()["Number of Established Sessions"]))

    def log(self) -> str:
        """What the client itself wrote down."""
        directory = Path(f"/proc/{self.pid}/root/var/log/softether/client_log")
        logs = sorted(directory.glob("*.log"))
        return "".join(path.read_text(encoding="utf-8", errors="replace") for path in logs)

    def pids(self) -> list[int]:
        """The processes of the client itself, as seen from outside."""
        found = []
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if (
                    entry.isdigit()
                    and os.readlink(f"/proc/{entry}/ns/pid") == space
                    and b"vpnclient" in Path(f"/proc/{entry}/cmdline").read_bytes()
                ):
                    found.append(int(entry))
        return found


class Service:
    """A server of ours in the foreground, on the network of ``host`` or on the loopback."""

    def __init__(self, directory: Path, config: str, host: Host | None = None) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.config = directory / "pkvpn.toml"
        self.host = host
        self.configure(config)
        self._output: IO[str] | None = None
        self._process: subprocess.Popen[str] | None = None

    def configure(self, text: str) -> None:
        """Write the configuration; a service that runs reads it at the next reload."""
        # Users of their own may not pass to the directories of a test.
        places = (
            '[service]\nstate_dir = "state"\nruntime_dir = "run"\ncore_user = ""\nedge_user = ""\n'
        )
        self.config.write_text(places + text, encoding="utf-8")

    def start(self) -> None:
        # TERM, when the test run is killed: the tree ends by itself.
        command = ["setpriv", "--pdeathsig", "TERM", *self._line("execsvc")]
        if self.host is not None:
            command = self.host.beside(*command)
        with (self.directory / "output").open("a", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True, cwd=ROOT
            )
        eventually(self.is_whole, within=20.0, every=0.05)

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15.0)
        finally:
            process.kill()
            process.wait()

    def kill_everything(self) -> None:
        """kill -9 of the whole tree at once."""
        assert self._process is not None
        for pid in [self._process.pid, *(child["pid"] for child in self.children().values())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def _line(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "pkvpn", "--config", str(self.config), *words]

    def cli(self, *words: str, stdin: str = "") -> str:
        """What a verb prints."""
        line = self._line(*words)
        return run(*(line if self.host is None else self.host.beside(*line)), stdin=stdin)

    def json(self, *words: str) -> Any:
        return json.loads(self.cli(*words, "--json"))

    def ask(self, verb: str, **args: Any) -> Any:
        """The core's answer."""
        return control.ask(str(self.directory / "run/admin.sock"), verb, args, timeout=10.0)

    def watchdog(self, verb: str, **args: Any) -> Any:
        return control.ask(str(self.directory / "run/control.sock"), verb, args, timeout=10.0)

    def add_hub(self, hub: str, **passwords: str) -> None:
        self.ask("hub.add", name=hub)
        for user, password in passwords.items():
            self.ask("user.add", hub=hub, name=user, password=password)

    def is_whole(self) -> bool:
        """Does everything run?"""
        if self._process is not None and self._process.poll() is not None:
            raise RuntimeError(f"the service has ended: {self.told()}")
        return all(child["state"] == "up" for child in self.children().values())

    def children(self) -> dict[str, dict[str, Any]]:
        return {child["name"]: child for child in self.watchdog("status")["children"]}

    def pid(self, child: str) -> int:
        """Of the incarnation that serves."""

        def look() -> int:
            now = self.children()[child]
            assert now["state"] == "up", now
            return int(now["pid"])

        return eventually(look, within=20.0)

    def kill(self, *children: str) -> None:
        """kill -9, all of them at once; returns when their successors serve."""
        before = {self.pid(child) for child in children}
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not before & {self.pid(child) for child in children}, within=20.0)

    def port(self) -> int:
        """Where the first listener really is."""
        return int(self.watchdog("status")["listeners"][0]["port"])

    def sessions(self, hub: str, user: str = "") -> list[dict[str, Any]]:
        """By user, if one is named."""
        found = self.ask("session.list", hub=hub)
        return [one for one in found if user in ("", one["user"])]

    def told(self) -> str:
        """What went wrong, for the one who reads a failed test."""
        texts = [self.directory / "output", self.directory / "state/pkvpn.log"]
        return "\n".join(path.read_text() for path in texts if path.exists())[-6000:]


class ChaoticService(Service):
    """The service in the laboratory: its children obey `pkvpn.chaos.injector.order`."""

    @property
    def orders(self) -> Path:
        return self.directory / "orders"

    def _line(self, *words: str) -> list[str]:
        if words == ("execsvc",):
            self.orders.mkdir(exist_ok=True)
            return [sys.executable, "-m", "pkvpn.chaos", str(self.config), str(self.orders)]
        return super()._line(*words)

    def restarts(self) -> dict[str, int]:
        return {name: child["restarts"] for name, child in self.children().items()}


def lay_cables(run_on_server: Callable[..., str], clients: list[StockClient]) -> None:
    """Have all clients on one switch, at which the server is 10.99.0.1."""
    run_on_server("ip", "link", "add", "lan", "type", "bridge")
    run_on_server("ip", "addr", "add", "10.99.0.1/24", "dev", "lan")
    run_on_server("ip", "link", "set", "lan", "up")
    for client in clients:
        port = f"port{client.number}"
        run_on_server(
            "ip", "link", "add", port, "type", "veth",
            "peer", "name", "eth0", "netns", str(client.pid),
        )  # fmt: skip
        run_on_server("ip", "link", "set", port, "master", "lan", "up")
        client.run("ip", "addr", "add", f"10.99.0.1{client.number}/24", "dev", "eth0")
        client.run("ip", "link", "set", "eth0", "up")


class Bed:
    """One server, two stock clients."""

    def __init__(self, directory: Path, config: str) -> None:
        self._stack = contextlib.ExitStack()
        try:
            self.server = self._host(Host())
            self.clients = [self._host(StockClient(number)) for number in (1, 2)]
            lay_cables(self.server.run, self.clients)
            self.service = Service(directory, config, self.server)
            self._stack.callback(self.service.stop)
        except BaseException:
            self._stack.close()
            raise

    def _host(self, host: Any) -> Any:
        self._stack.callback(host.close)
        return host

    def connect(self, port: int, hub: str) -> None:
        """Have both clients log in."""
        for client in self.clients:
            client.begin(f"10.99.0.1:{port}", hub)
        for client in self.clients:
            client.wait_established()

    def close(self) -> None:
        self._stack.close()
