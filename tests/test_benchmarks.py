"""What benchmarks/README.md says is what was measured, and what was measured can be believed."""

from __future__ import annotations

import datetime as dt
import importlib.util
import json
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from benchmarks import common
from benchmarks.__main__ import PAGES, PROGRAMS, README, as_measured, with_figures
from benchmarks.echo import Asker
from benchmarks.gaps import HANGS, LOADED, UNLOADED
from benchmarks.recording import Row, Screen, draw
from benchmarks.reloads import HAPROXY, NGINX, back_ms
from benchmarks.streams import Line, answer
from pkvpn.edge import certificate


def a_result(**changes: Any) -> dict[str, Any]:
    facts = {"processors": 2, "model": "CPU", "kernel": "6", "python": "3.11"}
    result = {
        "name": "idle", "commit": "0123456789abcdef", "changed": False, "seed": 1,
        "date": "2026-01-02T03:04:05+00:00", "duration": 12.3, "settings": {"quick": False},
        "machine": facts, "notes": ["A note."], "raw": {},
        "table": {"columns": ["what", "ms"], "rows": [["a", 1.23456], ["b", None], ["c", 1234.5]]},
    }  # fmt: skip
    return result | changes


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_a_page_shows_the_figures_that_were_measured(page: Path) -> None:
    assert as_measured(page) == page.read_text(encoding="utf-8"), "run scripts/bench --readme"


def test_the_readme_has_a_place_for_every_benchmark() -> None:
    text = README.read_text(encoding="utf-8")
    for name, (_, words) in PROGRAMS.items():
        assert text.count(f"<!-- figures: {name} -->\n") == 1, name
        assert importlib.util.find_spec(f"benchmarks.{words[0]}") is not None, name


def test_a_result_says_what_it_depends_on() -> None:
    for path in common.RESULTS.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["name"] == path.stem
        assert set(a_result()) <= set(result), path
        assert len(result["commit"]) == 40, path
        assert not result["settings"]["quick"], f"{path}: a quick run is no measurement"
        columns = len(result["table"]["columns"])
        assert all(len(row) == columns for row in result["table"]["rows"]), path


def test_figures_stand_between_their_markers_and_nothing_else_changes(tmp_path: Path) -> None:
    (tmp_path / "idle.json").write_text(json.dumps(a_result()), encoding="utf-8")
    text = "before\n<!-- figures: idle -->\nold\n<!-- end of figures -->\nafter\n"

    shown = with_figures(text, tmp_path)

    assert "old" not in shown
    assert "| a | 1.23 |\n| b | - |\n| c | 1234 |" in shown
    assert "commit 0123456789, seed 1" in shown
    assert shown.startswith("before\n")
    assert shown.endswith("\nafter\n")
    assert with_figures(shown, tmp_path) == shown


def test_a_benchmark_without_a_result_says_so(tmp_path: Path) -> None:
    text = "<!-- figures: idle -->\n<!-- end of figures -->\n"
    assert "Not measured yet." in with_figures(text, tmp_path)


def test_changed_files_and_quick_runs_are_named() -> None:
    assert "with changes" in common.render(a_result(changed=True))
    assert "quick run" in common.render(a_result(settings={"quick": True}))


def test_quantiles_are_values_that_were_seen() -> None:
    values = [float(number) for number in range(1, 101)]
    assert common.quantile(values, 0.95) == 96.0
    assert common.quantile(values, 1.0) == 100.0
    assert common.median([3.0, 1.0, 2.0]) == 2.0


_BUSY_THREAD = """
import threading, time

def work():
    while time.thread_time() < 0.5:
        pass
    print("done", flush=True)
    time.sleep(60)

threading.Thread(target=work).start()
"""


def test_the_cpu_time_of_a_process_counts_its_threads() -> None:
    with subprocess.Popen([sys.executable, "-c", _BUSY_THREAD], stdout=subprocess.PIPE) as busy:
        try:
            assert busy.stdout is not None
            assert busy.stdout.readline() == b"done\n"
            seconds, times = common.schedstat(busy.pid)
            assert times > 0
            assert seconds >= 0.5
            assert abs(seconds - common.cpu_seconds(busy.pid)) < seconds / 10
            assert common.memory(busy.pid)["uss"] <= common.memory(busy.pid)["rss"]
        finally:
            busy.kill()


def test_every_action_has_its_share_of_the_rounds() -> None:
    names = [*LOADED, *UNLOADED, *HANGS]
    assert len(names) == len(set(names))
    assert not [action for action in names if "," in action]


@pytest.mark.slow
def test_an_echo_counts_what_is_lost_and_how_long_it_was_silent() -> None:
    words = [sys.executable, "-m", "benchmarks.echo", "ask", "127.0.0.1"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(10.0)

        def answer() -> None:
            # Swallow 50 in a row and say one twice; nothing in it is the end.
            number = 0
            while True:
                data, sender = sock.recvfrom(100)
                if not data:
                    return
                if not 50 <= number < 100:
                    sock.sendto(data, sender)
                if number == 10:
                    sock.sendto(data, sender)
                number += 1

        thread = threading.Thread(target=answer)
        thread.start()
        asker = Asker([*words, str(sock.getsockname()[1])])
        try:
            asker.begin(0.3)
            found = asker.finish()
        finally:
            asker.close()
            sock.sendto(b"", sock.getsockname())
            thread.join()
    # A machine that is busy at the end of the round sends a few less than are due.
    assert found["due"] == 300 >= found["sent"] > 110
    assert (found["lost"], found["twice"]) == (50, 1)
    assert found["silence_ms"] > 0


# --- the recording


def test_a_terminal_shows_what_the_demo_wrote() -> None:
    screen = Screen()
    for piece in (
        "one\r\ntwo\r\n", "\r\x1b[K\x1b[33mkill\x1b[0m\r\n\x1b[K\x1b[1mlive\x1b[0m\x1b[F",
        "\r\x1b[K\x1b[33mkill more\x1b[0m\r\n\x1b[K\x1b[", "1mliver\x1b[0m\x1b[F",
        "\r\x1b[Jdone\r\n",
    ):  # fmt: skip
        screen.feed(piece)
        if piece.startswith("1m"):
            assert screen.rows == [("one", 0), ("two", 0), ("kill more", 33), ("liver", 1)]
    assert screen.rows == [("one", 0), ("two", 0), ("done", 0), ("", 0)]
    with pytest.raises(ValueError, match="not known"):
        screen.feed("\x1b[5A")


def test_a_picture_that_does_not_move_shows_the_last_frame() -> None:
    frames = [
        (0.0, [Row("first", 1)]),
        (1.0, [Row("first", 1), Row("a < b")]),
        (2.0, [Row("first", 1), Row("last")]),
    ]
    root = ET.fromstring(draw(frames, "title"))
    texts = [one for one in root if one.tag.endswith("}text")]
    assert {one.text: one.get("visibility") for one in texts} == {
        "first": None, "a < b": "hidden", "last": None,
    }  # fmt: skip
    times = {one.text: [set_.get("begin") for set_ in one] for one in texts}
    assert times == {"first": [], "a < b": ["t.begin+1.00s"], "last": ["t.begin"]}


# --- who is cut off


def test_who_was_not_cut_is_back_when_it_is_heard_and_who_never_came_back_has_no_time() -> None:
    assert back_ms({"connections_cut": 0, "silence_ms": 5.0, "back_ms": None}) == 5.0
    assert back_ms({"connections_cut": 1, "silence_ms": 5.0, "back_ms": 70.0}) == 70.0
    assert back_ms({"connections_cut": 2, "silence_ms": 39000.0, "back_ms": None}) is None
    assert back_ms({"connections_cut": 1, "silence_ms": 8.0}) == 8.0


def test_the_proxies_are_given_whole_configurations() -> None:
    for text in (HAPROXY, NGINX):
        made = text.format(directory="/place")
        assert made.count("{") == made.count("}")
        assert "/place/" in made


class CuttingProxy:
    """Takes TLS, passes it on, and cuts the first connection when it is told to."""

    def __init__(self, place: Path, behind: int) -> None:
        cert, key = place / "c", place / "k"
        certificate.ensure(cert, key, "localhost", dt.datetime.now(dt.UTC))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(cert, key)
        self._behind = behind
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cut = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        for number in range(2):
            plain, _ = self._listener.accept()
            self._threads.append(threading.Thread(target=self._pass_on, args=(plain, number)))
            self._threads[-1].start()

    def _pass_on(self, plain: socket.socket, number: int) -> None:
        with (
            self._context.wrap_socket(plain, server_side=True) as near,
            socket.create_connection(("127.0.0.1", self._behind)) as far,
        ):
            near.settimeout(0.05)
            while not (number == 0 and self.cut.is_set()):
                try:
                    data = near.recv(65536)
                    if not data:
                        return
                    far.sendall(data)
                    near.sendall(far.recv(65536))
                except TimeoutError:
                    continue
                except OSError:
                    return

    def close(self) -> None:
        for thread in self._threads:
            thread.join()
        self._listener.close()


@pytest.mark.slow
def test_a_stream_that_is_cut_is_counted_and_dialled_again(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        behind = free.getsockname()[1]
    pid = common.fork(lambda: answer(behind))
    try:
        common.wait_until(lambda: _serves(behind), 5.0, "the echo")
        proxy = CuttingProxy(tmp_path, behind)
        line = Line(proxy.port)
        whole = line.round(0.3)
        assert (whole["due"], whole["connections_cut"], whole["lost"]) == (300, 0, 0)
        assert whole["back_ms"] is None
        assert whole["sent"] > 0
        proxy.cut.set()
        cut = line.round(0.5)
        assert cut["connections_cut"] == 1
        assert cut["back_ms"] > 0.0
        line.close()
        proxy.close()
    finally:
        common.end([pid])


def _serves(port: int) -> bool:
    socket.create_connection(("127.0.0.1", port)).close()
    return True
