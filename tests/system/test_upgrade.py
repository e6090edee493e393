"""`upgrade` of the real service, with code that is good and code that is not; nobody is cut off."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pkvpn.client.session import VpnClient
from tests.support import eventually
from tests.system.bed import ROOT, Service
from tests.system.test_own_clients import exchange

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


class CopiedService(Service):
    """A service that runs from a copy of the code, which a test may change."""

    @property
    def code(self) -> Path:
        return self.directory / "code"

    def copy(self) -> None:
        shutil.rmtree(self.code, ignore_errors=True)
        shutil.copytree(
            ROOT / "pkvpn", self.code / "pkvpn", ignore=shutil.ignore_patterns("__pycache__")
        )

    def append(self, path: str, text: str) -> None:
        with (self.code / "pkvpn" / path).open("a") as file:
            file.write(text)

    def _line(self, *words: str) -> list[str]:
        line = super()._line(*words)
        if words != ("execsvc",):
            return line
        return ["sh", "-c", 'cd "$0" && exec "$@"', str(self.code), *line]

    def upgrade(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._line("upgrade"), capture_output=True, text=True, timeout=100.0, cwd=ROOT
        )


class Visit:
    def __init__(self, service: CopiedService, one: VpnClient, two: VpnClient) -> None:
        self.service = service
        self.clients = (one, two)

    def serves(self) -> None:
        eventually(self.service.is_whole, within=20.0)
        exchange(*self.clients, b"after")
        assert [(one.logins, one.resumptions) for one in self.clients] == [(1, 0), (1, 0)]

    def restarts(self) -> list[int]:
        return [int(one["restarts"]) for one in self.service.children().values()]

    def image(self) -> int:
        return int(self.service.watchdog("status")["watchdog"]["image"])


@pytest.fixture
def config() -> str:
    return 'listen = ["127.0.0.1:0"]\n'


@pytest.fixture
def visit(tmp_path: Path, config: str) -> Iterator[Visit]:
    service = CopiedService(tmp_path / "service", config)
    service.copy()
    with ExitStack() as stack:
        stack.callback(service.stop)
        service.start()
        service.add_hub("T", u1="pw1", u2="pw2")
        clients = []
        for user, password in (("u1", "pw1"), ("u2", "pw2")):
            client = VpnClient("127.0.0.1", service.port(), "T", user, password)
            stack.callback(client.close)
            client.connect()
            clients.append(client)
        made = Visit(service, *clients)
        made.serves()
        yield made


def test_good_code_replaces_everybody_and_no_client_notices(visit: Visit) -> None:
    service = visit.service
    pid, port = service.watchdog("status")["watchdog"]["pid"], service.port()
    service.append("core/main.py", "# newer\n")
    done = service.upgrade()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"The service (pid {pid}) goes on with the installed program.\n"
    assert (visit.image(), visit.restarts()) == (2, [1, 1, 1, 1])
    assert service.port() == port
    visit.serves()


def test_code_that_does_not_start_is_refused_with_its_own_words(visit: Visit) -> None:
    visit.service.append("core/main.py", "import nowhere\n")
    done = visit.service.upgrade()
    assert done.returncode == 1
    assert "upgrade refused, the service goes on as it was" in done.stderr
    assert "No module named 'nowhere'" in done.stderr
    assert (visit.image(), visit.restarts()) == (1, [0, 0, 0, 0])
    visit.serves()


@pytest.mark.parametrize("name", ["core", "edge"])
def test_code_whose_child_does_not_come_up_is_undone_and_no_client_notices(
    visit: Visit, name: str
) -> None:
    text = "def main(child, settings):\n    raise RuntimeError('bad code')\n"
    visit.service.append(f"{name}/main.py", text)
    done = visit.service.upgrade()
    assert done.returncode == 1
    assert "does not come up with the new code" in done.stderr
    visit.serves()
    # And good code is taken after that.
    visit.service.copy()
    assert visit.service.upgrade().returncode == 0
    visit.serves()


@pytest.mark.parametrize(
    "config", ['listen = ["127.0.0.1:0"]\n[watchdog]\nstart_timeout = 4\n'], ids=["impatient"]
)
def test_code_that_lets_nobody_in_does_not_pass_its_canary_and_is_undone(visit: Visit) -> None:
    """Every child of it comes up, and those who are there already notice nothing."""
    visit.service.append("core/login.py", "LoginDesk.answer = lambda self, *args: 1 // 0\n")
    done = visit.service.upgrade()
    assert done.returncode == 1
    assert "canary does not come up with the new code" in done.stderr
    visit.serves()
    assert visit.image() == 3  # there, and back again
    # Who is new is let in again.
    with contextlib.closing(
        VpnClient("127.0.0.1", visit.service.port(), "T", "u1", "pw1", reconnect=False)
    ) as another:
        another.connect()
        assert another.logins == 1
