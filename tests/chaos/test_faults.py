"""The catalogue is whole, and what stands in it can be carried out."""

from __future__ import annotations

import inspect
import random

import pytest

from pkvpn.chaos.deeds import DEEDS, NEEDS
from pkvpn.chaos.faults import FAULTS, NOT_MADE, Promise, chosen, class_of, harmless
from pkvpn.chaos.injector import WAYS
from pkvpn.chaos.laboratory import mixture
from pkvpn.watchdog.verdict import Verdict

# What a manager of processes must survive, by the names of the catalogue: nothing falls out of it
# unnoticed, and what is new is written down twice.
MADE = """
kill-core kill-edge kill-canary kill-log kill-core-and-edge kill-all-children
kill-standby-core kill-standby-edge kill-core-and-standby kill-edge-and-standby
kill-core-with-stopped-standby kill-edge-with-stopped-standby
kill-edge-while-adopting kill-core-while-learning segv-core segv-edge abort-core abort-edge
exit-core exit-edge exit-1-core raise-core raise-edge raise-canary sibling-core daemon-core
scribble-edge crash-loop-core crash-loop-edge respawns traced-and-killed frozen-and-killed
block-core block-edge block-canary busy-core busy-edge gil-core gil-edge vfork-core vfork-edge
live-thread-core logging-lock-core deaf-core deaf-edge stop-reading-core stop-reading-edge
close-listener-edge leak-edge stop-core stop-edge mute-core mute-edge garbage-core garbage-edge
partial-core partial-edge pause-core pause-edge pause-canary pause-log slow-core slow-edge
log-flood zombies trace-core freeze-core starve-core hang-in-start hang-in-standby hang-in-stop
kill-watchdog kill-watchdog-in-respawn kill-watchdog-in-stop kill-watchdog-in-start
kill-watchdog-in-upgrade kill-watchdog-in-fork kill-everything kill-in-wrong-order nobody-reaps
term-watchdog term-twice term-core pause-watchdog kill-core-without-watchdog
flood-without-watchdog starve-watchdog freeze-tree bug-in-policy bug-in-loop
no-files-edge no-files-watchdog no-processes no-memory-core out-of-memory-core disk-full-log
disk-full-core logs-removed kill-core-in-writes runtime-cleared port-contended
start-twice start-race start-while-stopping start-refused stale-pid-file torn-files
start-without-stdio start-with-signals-off start-bare
hang-up quit-all reload reload-wrong reload-and-kill restart-core restart-edge restart-canary
restart-log upgrade upgrade-and-kill upgrade-refused upgrade-undone
rubbish slow-peers wrong-passwords login-storm login-storm-and-kill login-storm-and-kill-edge
"""
UNMADE = """
out-of-memory-watchdog dumping uninterruptible double-verdict clock-steps
pid-reuse reaped-by-others slow-disk no-proc address-gone tap-gone process-1 rare-crashes
dependency-down ports-refused systemd long-frames denied-evidence windows
"""
CHILDREN = ("core", "edge-1", "canary", "log")


def test_the_catalogue_is_whole() -> None:
    assert set(FAULTS) == set(MADE.split())
    assert {one.id for one in NOT_MADE} == set(UNMADE.split())
    assert not set(FAULTS) & set(UNMADE.split())
    assert all(one.why for one in NOT_MADE)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=lambda fault: fault.id)
def test_a_fault_can_be_carried_out_as_it_is_written(fault: object) -> None:
    from pkvpn.chaos.faults import Fault

    assert isinstance(fault, Fault)
    inspect.signature(DEEDS[fault.deed]).bind(None, *fault.args)
    assert set(fault.needs) <= set(NEEDS)
    classes = {verdict.value for verdict in Verdict} | {"dead", "start-timeout"}
    for word in (*fault.expects, *fault.may):
        child, _, verdict = word.partition(" ")
        assert (child in CHILDREN and verdict in classes) or (not verdict and _is_news(word)), word
    if "ordered" in fault.deed:
        assert fault.args[-1] in WAYS or fault.args[1] in WAYS
    if fault.promise is Promise.ENDED:
        assert not fault.expects  # the journal belongs to the tree that ended


def _is_news(word: str) -> bool:
    return class_of({"event": word}) == word


def test_every_way_to_go_wrong_is_in_the_catalogue() -> None:
    words = {arg for fault in FAULTS.values() for arg in fault.args}
    # Those that an operator can do as well are done from outside.
    assert set(WAYS) - words <= {"pause", "kill", "ignore-stop"}


def test_every_child_that_is_killed_or_hangs_is_named_by_the_journal() -> None:
    for fault in FAULTS.values():
        if fault.group == "death" and not fault.id.startswith("kill-standby"):
            assert fault.expects, fault.id


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({"event": "condemned", "child": "core", "verdict": "blocked"}, "core blocked"),
        ({"event": "verdict", "child": "core", "verdict": "starved"}, "core starved"),
        ({"event": "verdict", "child": "core", "verdict": "ok"}, ""),
        ({"event": "state", "child": "core", "state": "starting", "why": "crash"}, "core dead"),
        ({"event": "state", "child": "core", "state": "backoff", "why": "clean"}, "core dead"),
        ({"event": "state", "child": "core", "state": "up", "why": "crash"}, ""),
        ({"event": "state", "child": "core", "state": "starting", "why": "hang"}, ""),
        ({"event": "state", "child": "core", "state": "stopping", "why": "start-timeout"},
         "core start-timeout"),
        ({"event": "not-condemned", "child": "core", "text": "core was away"}, ""),
        ({"event": "reloaded", "replaced": []}, "reloaded"),
        ({"event": "starting"}, ""),
    ],
)  # fmt: skip
def test_the_cause_in_an_entry_of_the_journal(entry: dict[str, object], word: str) -> None:
    assert class_of(entry) == word


def test_what_is_no_harm_and_what_is() -> None:
    assert harmless("core starved")
    assert harmless("watchdog-away")
    assert not harmless("core blocked")
    assert not harmless("core dead")
    assert not harmless("internal-error")


def test_faults_are_chosen_by_patterns_in_the_order_of_the_catalogue() -> None:
    assert [one.id for one in chosen(["restart-*", "kill-core"])] == [
        "kill-core", "restart-core", "restart-edge", "restart-canary", "restart-log",
    ]  # fmt: skip
    assert chosen([]) == list(FAULTS.values())
    with pytest.raises(ValueError, match="'nothing-such'"):
        chosen(["kill-core", "nothing-such"])


def test_a_mixture_of_faults_leaves_somebody_who_answers() -> None:
    possible = [fault for fault in FAULTS.values() if not fault.alone]
    silencing = {"watchdog_paused", "starved", "frozen", "limited", "no_processes", "watchdog_bug"}
    for seed in range(500):
        faults = mixture(possible, random.Random(seed))
        assert faults == mixture(possible, random.Random(seed))
        assert 1 <= len(faults) <= 4
        assert len({fault.id for fault in faults}) == len(faults)
        if len(faults) > 1:
            assert all(fault.promise is not Promise.ENDED for fault in faults)
            assert not silencing & {fault.deed for fault in faults[:-1]}
            ill = [f.args[0] for f in faults if f.deed == "ordered"]
            assert len(set(ill)) == len(ill)
