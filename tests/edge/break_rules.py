"""Breaks each rule of a connection that is data, one after the other; the test that is named fails.

    python -m tests.edge.break_rules [NUMBER ...]

Strategy: a break is a text of the code and what stands there instead, the slip or the thoughtless
simplification that the rule forbids.  It is made in a copy, and the one test is run there; with
numbers only those rules are broken.  `test_rules.py` sees in each run of the suite that the texts
and the tests are still there, and that ARCHITECTURE.md names the same ones; this program takes some
minutes and is for whoever has changed one of these lines, or doubts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

_CHECKPOINT = "pkvpn/edge/checkpoint.py"
_CONNECTION = "pkvpn/edge/connection.py"
_MAIN = "pkvpn/edge/main.py"
_KERNEL = "pkvpn/edge/kernel.py"
_RECORDS = "pkvpn/edge/tls_records.py"
_HELD = "pkvpn/watchdog/held.py"

_TEST_CONNECTION = "tests/edge/test_connection.py"
_TEST_MAIN = "tests/edge/test_main.py"
_TEST_KERNEL = "tests/edge/test_kernel.py"
_TEST_RECORDS = "tests/edge/test_tls_records.py"
_TEST_MODEL = "tests/edge/test_model.py::test_a_kill_at_each_step_loses_nothing"


class Break(NamedTuple):
    """``old`` stands in the file once; with ``new`` in its place ``test`` fails."""

    rule: int
    path: str
    old: str
    new: str
    test: str


BREAKS = (
    # All that changes is in the copy that is switched.
    Break(
        1, _CONNECTION, "if records.keys_changed:", "if False:",
        f"{_TEST_CONNECTION}::test_a_successor_goes_on_with_keys_mode_blob_and_close",
    ),
    Break(
        1, _CONNECTION, "        else:\n            self.save_all()\n", "        self.save()\n",
        f"{_TEST_CONNECTION}::test_a_state_comes_in_force_whole_or_not_at_all",
    ),
    Break(1, _CHECKPOINT, "other = self._cold ^ 1", "other = self._cold", _TEST_MODEL),
    # One process at a time.
    Break(
        2, _MAIN, "fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
        f"{_TEST_MAIN}::test_an_edge_does_not_touch_what_another_still_has",
    ),
    Break(
        2, "pkvpn/watchdog/machine.py", "self.undead = True", "self.state = State.DOWN",
        "tests/watchdog/test_excuses.py::test_one_that_cannot_die_has_no_successor_until_it_can",
    ),
    Break(
        2, "pkvpn/watchdog/supervisor.py",
        "self._contain(slot, lambda: incarnation.drain_gifts(slot.kept, dead=True), now)", "pass",
        "tests/watchdog/test_bounds.py::test_what_was_given_in_the_moment_of_death_is_not_lost",
    ),
    # Positions.
    Break(
        3, _KERNEL, "frozenset({_CLOSE_WAIT, _LAST_ACK, _CLOSING, _TIME_WAIT})", "frozenset()",
        f"{_TEST_KERNEL}::test_ends_of_either_side_do_not_count",
    ),
    Break(
        3, _KERNEL, "frozenset({_FIN_WAIT1, _FIN_WAIT2, _LAST_ACK, _CLOSING, _TIME_WAIT})",
        "frozenset()", f"{_TEST_KERNEL}::test_our_own_end_does_not_count",
    ),
    Break(
        3, _KERNEL, "if info == before:", "if True:",
        f"{_TEST_KERNEL}::test_a_race_between_the_calls_is_no_position",
    ),
    Break(
        3, "pkvpn/listeners.py", "socket.SO_OOBINLINE, 1", "socket.SO_OOBINLINE, 0",
        f"{_TEST_KERNEL}::test_an_urgent_byte_counts_like_any_other",
    ),
    Break(
        3, _MAIN, "        if self._mistrust:\n", "        if False:\n",
        f"{_TEST_MAIN}::test_where_the_kernel_does_not_tell_positions_nothing_is_adopted",
    ),
    Break(
        3, _CHECKPOINT, "Ring(self.rx_memory, hot.in_position, received, hot.in_base)",
        "Ring(self.rx_memory, received, received, received)",
        "tests/edge/test_checkpoint.py::test_positions_outside_the_rings_are_refused",
    ),
    # A full ring.
    Break(
        4, _MAIN, "if connection.request or not piece:", "if False:",
        f"{_TEST_MAIN}::test_a_full_ring_is_not_the_end_of_a_client",
    ),
    Break(
        4, _CONNECTION, "max_body=MAX_REQUEST - MAX_HEAD", "max_body=1 << 40",
        f"{_TEST_CONNECTION}::test_what_is_no_request_ends_the_connection",
    ),
    Break(
        4, _CONNECTION, "if at + 4 + size > limit:", "if at > limit:",
        f"{_TEST_CONNECTION}::test_what_does_not_fit_is_cut_at_a_frame",
    ),
    # Identity.
    Break(
        5, _MAIN, "if conn != identity.conn or kernel.cookie(sock) != identity.cookie:",
        "if conn != identity.conn:", f"{_TEST_MAIN}::test_descriptors_of_others_are_not_adopted",
    ),
    Break(
        5, _MAIN, "self._started, self._counter = self.now, 1", "self._counter = 1",
        f"{_TEST_MAIN}::test_no_name_of_a_connection_comes_again",
    ),
    Break(
        5, _CHECKPOINT, "if not conn or conn in left:", "if conn in left:",
        "tests/edge/test_checkpoint.py::test_a_slot_whose_name_makes_no_sense_is_given_back",
    ),
    # The dirty bit.
    Break(
        6, _CHECKPOINT, "self._memory[self._dirty] = dirty", "self._memory[self._dirty] = False",
        _TEST_MODEL,
    ),
    Break(
        6, _MAIN, "connection.slot.set_dirty(True)", "pass",
        f"{_TEST_MAIN}::test_a_request_in_the_hands_of_a_dead_edge_is_asked_again",
    ),
    Break(
        6, _MAIN,
        "islice(self._sleeping, _ADOPTED_PER_TICK)", "islice((), _ADOPTED_PER_TICK)",
        f"{_TEST_MAIN}::test_sleepers_are_woken_by_their_clients_and_by_time",
    ),
    Break(
        6, _MAIN,
        "except (CheckpointError, kernel.PositionError, OSError, ValueError, KeyError) as error:",
        "except KeyError as error:",
        f"{_TEST_MAIN}::test_a_slot_that_makes_no_sense_costs_its_own_connection",
    ),
    # Poison.
    Break(
        7, _MAIN, "checkpoint.mark(peer.conn, connection.rx.start)", "pass",
        f"{_TEST_MAIN}::test_what_two_edges_die_of_is_closed_unread",
    ),
    Break(
        7, _MAIN, "fcntl.fcntl(self._lock, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)", "pass",
        f"{_TEST_MAIN}::test_the_memory_neither_shrinks_nor_grows",
    ),
    # Closing.
    Break(
        8, _MAIN, "            self._discard(peer)\n", '            self._gone(peer, "closed")\n',
        f"{_TEST_MAIN}::test_who_goes_on_sending_hears_the_goodbye_and_no_reset",
    ),
    Break(
        8, _MAIN, "peer.sock.shutdown(socket.SHUT_WR)", "pass",
        f"{_TEST_MAIN}::test_who_goes_on_sending_hears_the_goodbye_and_no_reset",
    ),
    Break(
        8, _MAIN, "            self._epoll.unregister(peer.fd)\n", "            pass\n",
        f"{_TEST_MAIN}::test_nobody_watches_a_connection_that_is_closed",
    ),
    Break(
        8, _MAIN, "            if now >= peer.deadline:\n", "            if False:\n",
        f"{_TEST_MAIN}::test_nobody_watches_a_connection_that_is_closed",
    ),
    Break(
        8, _CONNECTION, "\n_RESERVE = 1024\n", "\n_RESERVE = 0\n",
        f"{_TEST_CONNECTION}::"
        "test_key_updates_of_a_client_that_does_not_read_never_overflow_the_ring",
    ),
    # What is given to the watchdog.
    Break(
        9, _MAIN, "self._not_given.add(peer.conn)", "pass",
        f"{_TEST_MAIN}::test_what_the_watchdog_has_no_room_for_is_given_again",
    ),
    Break(
        9, _HELD, "if truncated or len(fds) != 1:", "if False:",
        "tests/watchdog/test_held.py::test_exactly_one_descriptor_goes_with_a_message",
    ),
    Break(
        9, _HELD, "if len(self.descriptors) >= self.limit and key not in self.descriptors:",
        "if False:",
        "tests/watchdog/test_bounds.py::test_what_is_given_comes_to_the_successor_until_it_is_dropped",
    ),
    Break(
        9, _HELD, "            _clear_linger(fd)\n", "            pass\n",
        "tests/watchdog/test_held.py::test_closing_what_was_given_never_waits",
    ),
    Break(
        9, _MAIN, "        self._add(peer)\n        self._strangers[peer.conn] = None\n",
        "        self._add(peer)\n        self._strangers[peer.conn] = None\n"
        "        self._give(peer)\n",
        f"{_TEST_MAIN}::"
        "test_a_connection_in_its_handshake_dies_with_its_edge_and_nothing_of_it_stays",
    ),
    # Memory.
    Break(
        10, _MAIN, "self._punch(*rings)",
        "pass", f"{_TEST_MAIN}::test_memory_of_connections_that_are_gone_is_given_back",
    ),
    Break(
        10, _MAIN, "if self.settings.memory_max:", "if False:",
        f"{_TEST_MAIN}::test_all_together_have_so_much_memory_and_who_reads_gets_his_frames",
    ),
    Break(
        10, _CONNECTION, "if self.rx.end > self._login_bytes:", "if False:",
        f"{_TEST_MAIN}::test_a_stranger_has_little_memory",
    ),
    # Records.
    Break(
        11, _RECORDS, "if kind != APPLICATION_DATA or version != 0x0303:", "if version != 0x0303:",
        f"{_TEST_RECORDS}::test_headers_that_may_not_come_are_refused_at_once",
    ),
    Break(
        11, _RECORDS, "if end < 0:", "if False:",
        f"{_TEST_RECORDS}::test_inner_texts_that_may_not_be_are_refused",
    ),
    Break(
        11, _RECORDS, 'if len(content) != 5 or content[:4] != b"\\x18\\0\\0\\1":', "if False:",
        f"{_TEST_RECORDS}::test_other_handshake_messages_are_refused",
    ),
    Break(
        11, _CONNECTION, "if self._updates > _KEY_UPDATES_PER_SECOND:", "if False:",
        f"{_TEST_CONNECTION}::test_too_many_key_updates_end_the_connection",
    ),
    Break(
        11, _CONNECTION, "if read < RECORDS_PER_KEY and written < RECORDS_PER_KEY:", "if True:",
        f"{_TEST_CONNECTION}::test_worn_keys_are_renewed_once_and_the_client_is_asked_to_renew_its_own",
    ),
    # The order of an edge's life, and who has which key.
    Break(
        12, _MAIN,
        "    try:\n        # Who is here already",
        "    try:\n        load_certificate(child, settings, tls)\n        # Who is here already",
        f"{_TEST_MAIN}::test_who_is_there_is_served_before_the_certificate_is_read_and_new_ones_after",
    ),
    Break(
        12, "pkvpn/keyholder.py", "                self._fill(files, _SHORT_PATIENCE)\n",
        "                self._fill(files, _SHORT_PATIENCE)\n"
        "                self.pem = certificate.joined(*files)\n",
        "tests/system/test_secrets.py::test_a_secret_lies_only_where_it_is_used",
    ),
)  # fmt: skip


def notices(one: Break) -> str:
    """Nothing if the test fails with the rule broken; else what it said."""
    with tempfile.TemporaryDirectory(prefix="pkvpn-break-") as name:
        copy = Path(name)
        for part in ("pkvpn", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / one.path
        path.write_text(path.read_text(encoding="utf-8").replace(one.old, one.new))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", one.test],
            cwd=copy, env=_environment(copy), capture_output=True, text=True, check=False,
            timeout=300.0,
        )  # fmt: skip
    # 1: tests failed; everything else is no answer.
    return "" if done.returncode == 1 else f"exit code {done.returncode}\n{done.stdout[-3000:]}"


def _environment(home: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(home), "PYTHONDONTWRITEBYTECODE": "1"}


def main() -> int:
    rules = {int(word) for word in sys.argv[1:]}
    survivors = 0
    for one in BREAKS:
        if rules and one.rule not in rules:
            continue
        said = notices(one)
        survivors += bool(said)
        how = f"NOBODY NOTICES: {said}" if said else "noticed"
        print(f"rule {one.rule}: {one.path}: {one.old.strip()!r}: {how}", flush=True)
    print(f"{survivors} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
