"""The service as process 1 of a container, with the lines of the Dockerfile and Docker's rights."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkvpn.watchdog import procfs
from tests.support import eventually
from tests.system.bed import ROOT

pytestmark = [pytest.mark.root, pytest.mark.netns, pytest.mark.slow]

DOCKERFILE = (ROOT / "packaging/container/Dockerfile").read_text()
# What Docker leaves to a container that asks for nothing.
RIGHTS = (
    "chown", "dac_override", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap",
    "net_bind_service", "net_raw", "sys_chroot", "mknod", "audit_write", "setfcap",
)  # fmt: skip


def words(instruction: str) -> list[str]:
    """What is to be run, with this checkout's program in the place of the installed one."""
    found = re.search(rf"^{instruction}\b.*?(\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert found is not None, instruction
    return [
        new
        for word in json.loads(found[1])
        for new in ([sys.executable, "-m", "pkvpn"] if word == "vpnserver" else [word])
    ]


class Container:
    """Namespaces of its own, and the first process in them."""

    def __init__(self, directory: Path) -> None:
        config = directory / "c.toml"
        config.write_text(
            '[service]\nlisten = ["127.0.0.1:443"]\nstate_dir = "state"\nruntime_dir = "run"\n'
        )
        self._environment = {**os.environ, "PKVPN_CONFIG": str(config), "PYTHONPATH": str(ROOT)}
        only = ",".join(("-all", *(f"+{name}" for name in RIGHTS)))
        prepare = 'ip link set lo up && exec "$@"'
        self.said = directory / "said"
        with self.said.open("wb") as said:
            self.outside = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--net", "--mount", "--fork",
                 "--kill-child", "--mount-proc", "sh", "-c", prepare, "sh",
                 "setpriv", "--inh-caps", only, "--bounding-set", only,
                 *words("ENTRYPOINT"), *words("CMD")],
                env=self._environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
            )  # fmt: skip
        self.first = eventually(lambda: next(iter(procfs.children_of(self.outside.pid)), 0))

    def do(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["nsenter", "--target", str(self.first), "--pid", "--net", "--mount", *command],
            env=self._environment, capture_output=True, text=True, timeout=30.0,
        )  # fmt: skip

    def is_healthy(self) -> bool:
        return self.do(*words("HEALTHCHECK")).returncode == 0


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    made = Container(tmp_path_factory.mktemp("container"))
    try:
        eventually(made.is_healthy, within=30.0)
        yield made
    finally:
        made.outside.kill()
        made.outside.wait()


def test_it_reaps_what_others_leave(container: Container) -> None:
    leave = "sh -c 'echo $$; exec sleep 1 >/dev/null 2>&1' &"
    number = int(container.do("sh", "-c", leave).stdout)

    def children() -> list[int]:
        return [pid for pid in procfs.children_of(container.first) if number_inside(pid) == number]

    (orphan,) = eventually(children)  # it is its child now
    eventually(lambda: not children() and not Path(f"/proc/{orphan}").exists())
    assert container.is_healthy()


def number_inside(pid: int) -> int:
    """What a process is called in its own namespace; 0: it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int(re.findall(r"^NSpid:.*\t(\d+)$", status, re.MULTILINE)[0])


def test_a_child_that_is_killed_is_replaced_and_its_health_is_what_serves(
    container: Container,
) -> None:
    core = next(
        pid
        for pid in procfs.children_of(container.first)
        if procfs.title_of(pid).endswith(": core")
    )
    os.kill(core, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{core}").exists())
    eventually(container.is_healthy, within=10.0)
    assert number_inside(container.first) == 1


def test_a_request_to_end_reaches_every_process(container: Container) -> None:
    # The last: it ends with it.
    below = procfs.descendants(container.first)
    assert len(below) >= 4
    os.kill(container.first, signal.SIGTERM)
    assert container.outside.wait(timeout=30.0) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in below)
    said = container.said.read_text()
    assert "Started." in said
    journal = (container.said.parent / "state/journal.jsonl").read_text()
    assert "stop-asked" in journal


def test_health_says_why_not(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('[service]\nstate_dir = "state"\nruntime_dir = "run"\n')
    done = subprocess.run(
        words("HEALTHCHECK"), env={**os.environ, "PKVPN_CONFIG": str(config)},
        capture_output=True, text=True, timeout=30.0,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "The service is not running.\n")
