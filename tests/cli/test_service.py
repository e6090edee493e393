"""The command line with a service: a fake one, that can be made slow, deaf or dead."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pkvpn.cli import FAILED, NOT_RUNNING, OK, main, service
from pkvpn.config import Settings
from pkvpn.watchdog import control, instance
from tests.support import eventually, process_gone

pytestmark = pytest.mark.slow

FAKE = Path(__file__).with_name("fake_service.py")
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Place:
    """A configuration with a runtime directory of its own, and what was started there."""

    directory: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def runtime(self) -> Path:
        return self.directory / "run"

    @property
    def config(self) -> str:
        return str(self.directory / "c.toml")

    def vpnserver(self, *line: str) -> int:
        return main(["--config", self.config, *line])

    def fake(self, stop_takes: str = "0") -> subprocess.Popen[bytes]:
        """Start a service and wait until it answers."""
        process = subprocess.Popen(
            [sys.executable, str(FAKE), str(self.runtime), stop_takes], cwd=ROOT, env=ENVIRONMENT
        )
        self.started.append(process)
        eventually(lambda: control.ask(str(self.runtime / "control.sock"), "status"))
        return process


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "c.toml").write_text(
        '[service]\nlisten = ["127.0.0.1:0"]\nstate_dir = "state"\nruntime_dir = "run"\n'
        "[watchdog]\nbeat_interval = 0.01\nhang_timeout = 0.05\nstart_timeout = 0.5\n"
        "stop_timeout = 0.1\n",
        encoding="utf-8",
    )
    made = Place(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.wait()


def test_status_shows_each_child_and_each_listener(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = place.fake()
    assert place.vpnserver("status") == OK
    lines = capsys.readouterr().out.splitlines()

    assert lines[0] == (f"Service: up (user mode), watchdog pid {fake.pid}, up 1h02m, sessions: 5")
    assert lines[2].split()[:3] == ["NAME", "PID", "STATE"]
    assert lines[3].split() == (
        "core 4242 up crash ok 1m15s 3 112ms 2ms 1.5% 30.0M 17".split()  # noqa: SIM905
    )
    assert lines[4].split() == ["edge-1", "-", "backoff", "-", "-", "-", "9", *"-----"]
    assert lines[6].split() == ["0.0.0.0:8888", "listening"]
    assert lines[7].split() == ["[::]:443", "refused:", "Permission", "denied"]


def test_status_as_json_is_the_watchdogs_answer_and_the_sessions(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = place.fake()
    assert place.vpnserver("status", "--json") == OK
    status = json.loads(capsys.readouterr().out)

    assert status["watchdog"]["pid"] == fake.pid
    assert status["children"][0]["rss"] == 31457280
    assert status["sessions"] == 5

    (place.runtime / "admin.sock").unlink()
    assert place.vpnserver("status", "--json") == OK
    # There is no core: it is not known, which is not zero.
    assert json.loads(capsys.readouterr().out)["sessions"] is None


def test_status_of_a_watchdog_that_hangs_says_so_with_code_4(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = place.fake()
    fake.send_signal(signal.SIGSTOP)
    try:
        assert place.vpnserver("status") == 4
        assert "The watchdog runs but does not answer" in capsys.readouterr().out
        assert place.vpnserver("tree") == 4
        assert str(FAKE) in capsys.readouterr().out
    finally:
        fake.send_signal(signal.SIGCONT)


def test_stop_ends_a_service_whose_watchdog_somebody_has_stopped(place: Place) -> None:
    fake = place.fake()
    fake.send_signal(signal.SIGSTOP)
    assert place.vpnserver("stop") == OK
    assert fake.wait(10.0) == 0


def test_status_of_a_killed_service_has_code_1(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = place.fake()
    fake.kill()
    fake.wait()

    assert place.vpnserver("status") == 1
    assert (
        capsys.readouterr().out == f"The service is dead; its pid file names process {fake.pid}.\n"
    )
    # Nobody is there to be stopped, and to the next stop that is no error.
    assert place.vpnserver("stop") == OK


def test_stop_prints_its_line_when_the_last_process_is_gone(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = place.fake(stop_takes="0.2")
    assert place.vpnserver("stop") == OK

    assert capsys.readouterr().out == "PacketiX VPN Server Service Stopped.\n"
    assert process_gone(fake.pid)
    assert place.vpnserver("status") == 3


def test_stop_needs_no_control_socket(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.fake()
    (place.runtime / "control.sock").unlink()

    assert place.vpnserver("stop") == OK
    assert capsys.readouterr().out == "PacketiX VPN Server Service Stopped.\n"


def test_a_stop_that_takes_too_long_names_what_is_left(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = place.fake(stop_takes="never")
    monkeypatch.setattr(service, "stop_budget", lambda _settings: 0.3)

    assert place.vpnserver("stop") == 1
    assert f"still there: pid {fake.pid}" in capsys.readouterr().err


def test_kill_ends_a_service_that_is_stopped_and_leaves_no_pid_file(place: Place) -> None:
    fake = place.fake(stop_takes="never")
    fake.send_signal(signal.SIGSTOP)

    assert place.vpnserver("kill") == OK
    assert process_gone(fake.pid)
    assert place.vpnserver("status") == 3


def test_requests_are_passed_on_and_refusals_are_told(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.vpnserver("reload") == NOT_RUNNING
    place.fake()
    assert place.vpnserver("reload") == OK
    assert place.vpnserver("force-reload") == OK
    assert place.vpnserver("upgrade") == 1
    assert "not now: upgrade" in capsys.readouterr().err


def test_the_running_core_is_asked_and_asked_again_until_a_list_is_complete(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.fake()
    assert place.vpnserver("session", "list", "--json") == OK
    names = [session["name"] for session in json.loads(capsys.readouterr().out)]
    assert names == [f"SID-{number}" for number in range(5)]

    assert place.vpnserver("session", "list") == OK
    assert capsys.readouterr().out.splitlines()[:2] == ["HUB  NAME   USER", "T    SID-0  u1"]

    assert place.vpnserver("bridge", "add", "T", "tap0", "--linux-bridge", "br0") == 1
    assert capsys.readouterr().err == (
        'vpnserver: bridge.add is refused: {"device": "tap0", "hub": "T", "linux_bridge": "br0"}\n'
    )


def test_tree_shows_the_processes_as_ps_does(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = place.fake()
    status = control.ask(str(place.runtime / "control.sock"), "status")
    assert status["watchdog"]["pid"] == fake.pid
    assert place.vpnserver("tree") == OK
    head, line = capsys.readouterr().out.splitlines()

    ps = subprocess.run(
        ["ps", "u", "-p", str(fake.pid)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    ours, theirs = line.split(), ps[1].split()
    assert head.split() == ps[0].split()
    assert (ours[:2], ours[4], ours[6]) == (theirs[:2], theirs[4], theirs[6])
    assert line.endswith(f"{FAKE} {place.runtime} 0")


# --- start ---------------------------------------------------------------------------------------


def say(*words: object, then: str = "") -> str:
    """A program that says words to `start`, does something and ends."""
    lines = "".join(json.dumps(word) + "\n" for word in words).encode()
    return f"import os, select, sys; fd = int(sys.argv[1]); os.write(fd, {lines!r}); {then}"


# Until nobody reads what it says any more.
HANG = "waiter = select.poll(); waiter.register(fd, 0); waiter.poll()"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let `start` launch a program of ours; its last argument is the descriptor to answer on."""

    def use(program: str) -> None:
        def command(_settings: Settings, ready_fd: int) -> list[str]:
            return [sys.executable, "-c", program, str(ready_fd)]

        monkeypatch.setattr(service, "_execsvc_command", command)

    return use


@pytest.fixture
def launches_a_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(settings: Settings, ready_fd: int) -> list[str]:
        runtime = str(settings.service.runtime_dir)
        return [sys.executable, str(FAKE), runtime, "0", str(ready_fd)]

    monkeypatch.setattr(service, "_execsvc_command", command)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.usefixtures("launches_a_fake")
def test_start_detaches_the_service_and_tells_what_was_refused(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.vpnserver("start") == OK
    try:
        out, err = capsys.readouterr()
        assert out == "PacketiX VPN Server Service Started.\n"
        assert err == "vpnserver: [::]:443 is refused: Permission denied\n"
        pid = instance.watchdog_pid(str(place.runtime / "lock"))
        assert pid
        # A session of its own, which it does not lead, and nothing of our terminal.
        assert os.getsid(pid) not in (os.getsid(0), pid)
        assert {os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)} == {os.devnull}

        assert place.vpnserver("start") == OK
        assert capsys.readouterr().out == f"The service is already running (pid {pid}).\n"

        assert place.vpnserver("restart") == OK
        out, _ = capsys.readouterr()
        assert out == (
            "PacketiX VPN Server Service Stopped.\nPacketiX VPN Server Service Started.\n"
        )
        assert instance.watchdog_pid(str(place.runtime / "lock")) != pid
    finally:
        assert place.vpnserver("stop") == OK


def test_one_child_is_replaced_by_its_name(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place.vpnserver("restart", "core") == NOT_RUNNING
    assert capsys.readouterr().err == "vpnserver: the service is not running\n"
    fake = place.fake()

    assert place.vpnserver("restart", "core") == OK
    assert capsys.readouterr().out == "core has been replaced (pid 4243).\n"
    assert place.vpnserver("restart", "nobody") == FAILED
    assert capsys.readouterr().err == "vpnserver: restart: no child is named 'nobody'\n"
    assert fake.poll() is None
    monkeypatch.setattr(service, "_PATIENCE", 0.1)
    assert place.vpnserver("restart", "edge-1") == FAILED
    assert "restart edge-1: backoff after 0.7 s" in capsys.readouterr().err


@pytest.mark.usefixtures("launches_a_fake")
def test_the_service_keeps_nothing_open_of_whoever_started_it(place: Place) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        assert place.vpnserver("start") == OK
        os.close(write)
        assert os.read(read, 1) == b""
    finally:
        os.close(read)
        assert place.vpnserver("stop") == OK


@pytest.mark.usefixtures("launches_a_fake")
def test_start_waits_for_a_stop_that_is_under_way(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    before = place.fake(stop_takes="0.3")
    control.ask(str(place.runtime / "control.sock"), "stop")

    assert place.vpnserver("start") == OK
    try:
        assert process_gone(before.pid)
        assert "Started." in capsys.readouterr().out
    finally:
        assert place.vpnserver("stop") == OK


def test_start_tells_the_reason_and_returns_its_code(
    place: Place, launches: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    launches(say({"progress": "binding"}, {"error": "no address to listen on", "code": 7}))

    assert place.vpnserver("start") == 7
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "vpnserver: binding",
        "vpnserver: the service did not start: no address to listen on",
    ]


def test_start_believes_a_service_that_found_another_one(
    place: Place, launches: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    launches(say({"already": 4711}))

    assert place.vpnserver("start") == OK
    assert capsys.readouterr().out == "The service is already running (pid 4711).\n"


def test_a_service_that_ends_without_a_word_is_an_error_that_names_the_log(
    place: Place, launches: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    launches(say({"progress": "reading the database"}))

    assert place.vpnserver("start") == 1
    err = capsys.readouterr().err
    assert "the last it said: reading the database" in err
    assert str(place.directory / "state/pkvpn.log") in err


def test_a_start_that_takes_too_long_ends_with_the_last_progress(
    place: Place,
    launches: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "_PATIENCE", 0.3)
    launches(say({"progress": "core starts"}, then=HANG))

    assert place.vpnserver("start") == 1
    assert "not ready after" in (err := capsys.readouterr().err)
    assert "the last it said: core starts" in err
