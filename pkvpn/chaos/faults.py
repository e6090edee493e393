"""The catalogue: every fault that the laboratory makes, and those that it cannot make, as data.

Strategy: pure.  An entry says what is done (a name of `deeds.DEEDS` with its arguments), which
entries of the journal must name the cause, and what is promised to the clients meanwhile.  What it
takes to do it and to see what came of it is elsewhere.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class Promise(IntEnum):
    """What clients are promised while it lasts; each promises all that the lower ones do."""

    ENDED = 0  # the service ends and is started again; accounts stay
    RESUMED = 1  # sessions stay, their connections may be made anew; nobody is refused
    KEPT = 2  # connections stay; frames may be lost
    WHOLE = 3  # no frame is lost


@dataclass(frozen=True)
class Fault:
    """``expects``: what the journal must say, as `classes` has it: "core blocked".  ``may``: what
    it may say besides; anybody else who dies or is condemned died without need.  ``hold``: so many
    seconds pass before it is undone.  ``needs``: of `deeds.NEEDS`.  ``alone``: too long to be
    mixed with others, or the journal, which is to name their causes, suffers itself."""

    id: str
    group: str
    what: str
    deed: str
    args: tuple[Any, ...] = ()
    expects: tuple[str, ...] = ()
    may: tuple[str, ...] = ()
    promise: Promise = Promise.WHOLE
    hold: float = 0.0
    needs: tuple[str, ...] = ()
    alone: bool = False


@dataclass(frozen=True)
class NotMade:
    """A fault that belongs to the catalogue and is not made here."""

    id: str
    what: str
    why: str


# What a journal may call the end of a child: `Verdict` where it was condemned, else these.
DEAD, START_TIMEOUT = "dead", "start-timeout"

CHILDREN = ("core", "edge-1", "canary", "log")
_SERVING = ("core", "edge-1")
# The log child is the watchdog's own, and takes no orders.
_OBEDIENT = ("core", "edge-1", "canary")


def _ordered(way: str, verdict: str, what: str, *children: str, **more: Any) -> Iterable[Fault]:
    """The same way to go wrong, by each of some children."""
    for child in children or _SERVING:
        yield Fault(
            f"{way}-{child.removesuffix('-1')}",
            "hang" if verdict != DEAD else "death",
            f"{child} {what}",
            "ordered",
            (child, way),
            (f"{child} {verdict}",),
            **more,
        )


_DEATHS = (
    *(
        Fault(f"kill-{child.removesuffix('-1')}", "death", f"kill -9 of {child}", "killed",
              (child,), (f"{child} dead",))
        for child in CHILDREN
    ),
    Fault("kill-core-and-edge", "death", "kill -9 of core and edge in one moment", "killed",
          ("core", "edge-1"), ("core dead", "edge-1 dead")),
    Fault("kill-all-children", "death", "kill -9 of all children in one moment", "killed",
          CHILDREN, ("core dead", "edge-1 dead", "canary dead"), ("log dead",)),
    Fault("kill-edge-while-adopting", "death", "kill -9 of the edge, and of two successors at once",
          "killed_again", ("edge-1", 2), ("edge-1 dead",)),
    Fault("kill-core-while-learning", "death", "kill -9 of the core, and of two successors at once",
          "killed_again", ("core", 2), ("core dead",)),
    *(
        fault
        for name, child in (("core", "core"), ("edge", "edge-1"))
        for fault in (
            Fault(f"kill-standby-{name}", "death", f"kill -9 of who stands by for {child}",
                  "standby_hurt", (child, "SIGKILL", False)),
            Fault(f"kill-{name}-and-standby", "death", f"kill -9 of {child} and who stands by",
                  "killed_with_standby", (child,), (f"{child} dead",)),
            Fault(f"kill-{name}-with-stopped-standby", "death",
                  f"kill -9 of {child}, and who stands by is stopped", "standby_hurt",
                  (child, "SIGSTOP", True), (f"{child} dead",), (f"{child} stopped",)),
        )
    ),
    *_ordered("segv", DEAD, "reads address 0"),
    *_ordered("abort", DEAD, "aborts"),
    *_ordered("exit", DEAD, "ends with 0 although nobody asked"),
    *_ordered("exit-1", DEAD, "ends with 1", "core"),
    *_ordered("raise", DEAD, "raises what nobody catches", *_OBEDIENT),
    *_ordered("sibling", DEAD, "dies and leaves a process that holds all its pipes", "core"),
    *_ordered("daemon", DEAD, "dies and leaves a daemon that ignores TERM", "core"),
    *_ordered("scribble", DEAD, "fills its checkpoint with rubbish and dies", "edge-1",
              promise=Promise.RESUMED),
    Fault("crash-loop-core", "death", "the core raises in each of its next four starts",
          "ordered_at_birth", ("core", "raise", 4), ("core dead",)),
    Fault("crash-loop-edge", "death", "the edge raises in each of its next two starts",
          "ordered_at_birth", ("edge-1", "raise", 2), ("edge-1 dead",)),
    Fault("respawns", "death", "kill -9 of the canary, ten times in a row", "killed_again",
          ("canary", 9), ("canary dead",)),
    Fault("traced-and-killed", "death", "kill -9 of a core that a debugger holds", "traced",
          ("core", True), ("core dead",), hold=0.5, needs=("ptrace",)),
    Fault("frozen-and-killed", "death", "kill -9 of a frozen core: no second one before the thaw",
          "frozen", (("core",), True), ("core dead",), ("core frozen",), hold=1.0,
          needs=("freezer",), alone=True),
)  # fmt: skip

_HANGS = (
    *_ordered("block", "blocked", "waits for a lock that it holds itself", *_OBEDIENT),
    *_ordered("busy", "busy", "turns in a loop of Python"),
    *_ordered("gil", "busy", "turns in C and keeps the interpreter's lock"),
    *_ordered("vfork", "blocked", "is in state D, for a helper that never comes to its exec"),
    *_ordered("live-thread", "blocked", "waits for ever while its threads work", "core"),
    *_ordered("logging-lock", "blocked", "waits for a lock of the logging", "core"),
    *_ordered("deaf", "deaf", "beats, and says itself that its work is not done", "core"),
    # It also says, untruly, that the core does not answer.
    *_ordered("deaf", "deaf", "beats, and says itself that its work is not done", "edge-1",
              may=("core deaf",)),
    *_ordered("stop-reading", "deaf", "beats, and does nothing else"),
    *_ordered("close-listener", "deaf", "serves its connections and accepts no more", "edge-1"),
    *_ordered("leak", "deaf", "opens files until it may open no more", "edge-1"),
    *_ordered("stop", "stopped", "stops itself, and again when it is continued"),
    *_ordered("mute", "mute", "closes its lifeline and lives on"),
    *_ordered("garbage", "corrupt", "writes rubbish on its lifeline"),
    *_ordered("partial", "corrupt", "writes a part of a beat, then whole ones"),
    *(
        Fault(f"pause-{child.removesuffix('-1')}", "hang", f"SIGSTOP of {child}", "signalled",
              (child, "SIGSTOP"), (f"{child} stopped",))
        for child in CHILDREN
    ),
    Fault("slow-core", "hang", "each turn of the core's loop takes 0.1 s, for 3 s", "ordered",
          ("core", "slow"), hold=3.0),
    Fault("slow-edge", "hang", "each turn of the edge's loop takes 0.1 s, for 3 s", "ordered",
          ("edge-1", "slow"), hold=3.0),
    Fault("log-flood", "hang", "the core logs 20,000 lines in one turn", "ordered",
          ("core", "log-flood"), may=("core busy", "core blocked"), hold=1.0),
    Fault("zombies", "hang", "the core leaves twenty grandchildren that end at once", "ordered",
          ("core", "double-fork"), hold=0.5),
    Fault("trace-core", "hang", "a debugger holds the core for 2 s", "traced", ("core", False),
          ("core traced",), hold=2.0, needs=("ptrace",)),
    Fault("freeze-core", "hang", "the core is frozen for 2 s", "frozen", (("core",), False),
          ("core frozen",), hold=2.0, needs=("freezer",)),
    Fault("starve-core", "hang", "the core gets no processor for 3 s", "starved", ("core",),
          may=("core starved",), hold=3.0, needs=("root",)),
    Fault("hang-in-start", "hang", "the next core hangs before it serves", "ordered_at_birth",
          ("core", "block", 1), (f"core {START_TIMEOUT}",), ("core dead",), alone=True),
    Fault("hang-in-standby", "hang", "who stands by for the core hangs, and its turn comes",
          "standby_hangs", ("core",), ("core dead",), alone=True),
    Fault("hang-in-stop", "hang", "the core ignores that it is to be replaced",
          "ignoring_the_stop", ("core",), ("restart-asked",), ("core blocked", "core dead")),
)  # fmt: skip

_WATCHDOG = (
    Fault("kill-watchdog", "watchdog", "kill -9 of the watchdog", "watchdog_killed", ("steady",),
          promise=Promise.ENDED),
    Fault("kill-watchdog-in-respawn", "watchdog", "the same just after the core", "watchdog_killed",
          ("respawn",), promise=Promise.ENDED),
    Fault("kill-watchdog-in-stop", "watchdog", "the same during a stop", "watchdog_killed",
          ("stop",), promise=Promise.ENDED),
    Fault("kill-watchdog-in-start", "watchdog", "the same during a start", "watchdog_killed",
          ("start",), promise=Promise.ENDED),
    Fault("kill-watchdog-in-upgrade", "watchdog", "the same during an upgrade", "watchdog_killed",
          ("upgrade",), promise=Promise.ENDED, alone=True),
    Fault("kill-watchdog-in-fork", "watchdog", "the same between a fork and the child's first act",
          "killed_in_fork", (), promise=Promise.ENDED, needs=("strace",), alone=True),
    Fault("kill-everything", "watchdog", "kill -9 of watchdog and children at once",
          "everything_killed", (), promise=Promise.ENDED),
    Fault("kill-in-wrong-order", "watchdog", "kill -9 of the core, then of the watchdog",
          "everything_killed", ("core first",), promise=Promise.ENDED),
    Fault("nobody-reaps", "watchdog", "kill -9 of the watchdog, which stays a zombie",
          "watchdog_killed", ("unreaped",), promise=Promise.ENDED),
    Fault("term-watchdog", "watchdog", "TERM to the watchdog", "stopped_by", ("watchdog", 1),
          promise=Promise.ENDED),
    Fault("term-twice", "watchdog", "TERM to the watchdog, twice", "stopped_by", ("watchdog", 2),
          promise=Promise.ENDED),
    Fault("term-core", "watchdog", "TERM to the core: a stop of all", "stopped_by", ("core", 1),
          promise=Promise.ENDED),
    Fault("pause-watchdog", "watchdog", "the watchdog is stopped for 2.5 s", "watchdog_paused", (),
          ("watchdog-away",), hold=2.5),
    Fault("kill-core-without-watchdog", "watchdog", "the core dies while the watchdog is stopped",
          "watchdog_paused", ("core", "kill"), ("watchdog-away", "core dead"), hold=1.0),
    Fault("flood-without-watchdog", "watchdog", "the core fills the pipe of a stopped watchdog",
          "watchdog_paused", ("core", "flood"), ("watchdog-away",), hold=2.0),
    Fault("starve-watchdog", "watchdog", "the watchdog gets no processor for 3 s", "starved",
          ("watchdog",), hold=3.0, needs=("root",)),
    Fault("freeze-tree", "watchdog", "the whole tree is frozen for 3 s, as by a suspend", "frozen",
          (("watchdog", *CHILDREN), False), ("watchdog-away",), hold=3.0, needs=("freezer",)),
    Fault("bug-in-policy", "watchdog", "the policy raises while it decides of the core",
          "watchdog_bug", ("policy", "core"), ("internal-error", "core dead")),
    Fault("bug-in-loop", "watchdog", "the watchdog's own loop raises", "watchdog_bug", ("loop",),
          ("watchdog-failed", "resumed"), alone=True),
)  # fmt: skip

_RESOURCES = (
    Fault("no-files-edge", "resources", "the edge may open no more files", "limited",
          ("edge-1", "NOFILE", 1, "", True), ("edge-1 deaf",)),
    Fault("no-files-watchdog", "resources", "no files for a new canary", "limited",
          ("watchdog", "NOFILE", 3, "canary"), ("spawn-failed",),
          ("canary dead", "report-failed"), hold=1.5),
    Fault("no-processes", "resources", "no process for a new canary", "no_processes",
          ("canary",), ("spawn-failed",), ("canary dead",), hold=1.5, needs=("pids",)),
    Fault("no-memory-core", "resources", "the core may have no more memory, and wants it",
          "limited_and_ordered", ("core", "AS", "grow"), ("core dead",)),
    Fault("out-of-memory-core", "resources", "the kernel kills the core for its memory",
          "out_of_memory", ("core",), ("core dead",), needs=("memory",)),
    Fault("disk-full-log", "resources", "the log child cannot write while the core dies",
          "limited", ("log", "FSIZE", 0, "core"), hold=0.5, alone=True),
    Fault("disk-full-core", "resources", "the database cannot grow", "database_full", (),
          hold=0.2),
    Fault("logs-removed", "resources", "journal, log and reports are removed under the log child",
          "logs_removed", ("core",), ("core dead",), alone=True),
    Fault("kill-core-in-writes", "resources", "kill -9 of the core while accounts are made",
          "killed_in_writes", ("core",), ("core dead",)),
    Fault("runtime-cleared", "resources", "the run-time directory is emptied under a living tree",
          "runtime_cleared", (), promise=Promise.ENDED, hold=0.5),
    Fault("port-contended", "resources", "another program wants the port while core and edge die",
          "port_contended", (), ("core dead", "edge-1 dead")),
)  # fmt: skip

_STARTS = (
    Fault("start-twice", "start", "three more starts while it runs", "second_starts", (3,)),
    Fault("start-race", "start", "five starts at once while nothing runs", "start_race", (5,),
          promise=Promise.ENDED),
    Fault("start-while-stopping", "start", "a start while the last tree stops",
          "start_while_stopping", (), promise=Promise.ENDED),
    Fault("start-refused", "start", "a start with a configuration that is wrong",
          "start_refused", (), promise=Promise.ENDED),
    Fault("stale-pid-file", "start", "a pid file that names somebody else's process",
          "left_behind", ("pid",), promise=Promise.ENDED),
    Fault("torn-files", "start", "a torn journal and rubbish in the pid file", "left_behind",
          ("torn",), promise=Promise.ENDED),
    Fault("start-without-stdio", "start", "a start without standard input and error",
          "started_oddly", ("stdio",), promise=Promise.ENDED),
    Fault("start-with-signals-off", "start", "a start with CHLD, TERM and HUP ignored and blocked",
          "started_oddly", ("signals",), promise=Promise.ENDED),
    Fault("start-bare", "start", "a start without HOME and locale, in a directory that is gone",
          "started_oddly", ("bare",), promise=Promise.ENDED),
)  # fmt: skip

_OPERATOR = (
    Fault("hang-up", "operator", "HUP to every process, as by a closed terminal", "signalled",
          ("all", "SIGHUP"), ("reloaded",)),
    Fault("quit-all", "operator", "QUIT to every child: stacks are written, all go on", "signalled",
          ("children", "SIGQUIT"), hold=0.5),
    Fault("reload", "operator", "reload", "asked", ("reload",), ("reloaded",)),
    Fault("reload-wrong", "operator", "reload of a configuration that is wrong", "wrong_reload", (),
          ("reload-refused",)),
    Fault("reload-and-kill", "operator", "reload, and kill -9 of the core in the same moment",
          "asked", ("reload", "", "core"), ("reloaded", "core dead")),
    *(
        Fault(f"restart-{child.removesuffix('-1')}", "operator", f"restart {child}", "asked",
              ("restart", child), ("restart-asked",))
        for child in CHILDREN
    ),
    Fault("upgrade", "operator", "upgrade to the same code", "upgraded", ("same",), ("upgraded",),
          alone=True),
    Fault("upgrade-and-kill", "operator", "kill -9 of core and edge during an upgrade", "upgraded",
          ("killed",), ("upgraded",), ("core dead", "edge-1 dead"), Promise.RESUMED, alone=True),
    Fault("upgrade-refused", "operator", "upgrade to code that does not start", "upgraded",
          ("broken",), ("upgrade-refused",), alone=True),
    Fault("upgrade-undone", "operator", "upgrade to code with a core that does not come up",
          "upgraded", ("bad core",), ("upgrade-undone",), ("core dead",), alone=True),
)  # fmt: skip

_PEERS = (
    Fault("rubbish", "peers", "60 connections that speak rubbish", "rubbish", (60,)),
    Fault("slow-peers", "peers", "100 connections that say nothing", "slow_peers", (100,),
          hold=1.0),
    Fault("wrong-passwords", "peers", "30 logins with a wrong password", "wrong_passwords", (30,)),
    Fault("login-storm", "peers", "100 clients log in at once", "login_storm", (100,)),
    Fault("login-storm-and-kill", "peers", "the same while the core is killed", "login_storm",
          (100, "core"), ("core dead",)),
    Fault("login-storm-and-kill-edge", "peers", "the same while the edge is killed", "login_storm",
          (100, "edge-1"), ("edge-1 dead",)),
)  # fmt: skip

FAULTS: Mapping[str, Fault] = {
    fault.id: fault
    for fault in (*_DEATHS, *_HANGS, *_WATCHDOG, *_RESOURCES, *_STARTS, *_OPERATOR, *_PEERS)
}

NOT_MADE = (
    NotMade("out-of-memory-watchdog", "the kernel kills the watchdog for its memory",
            "it is a SIGKILL of the watchdog: kill-watchdog"),
    NotMade("dumping", "a core dump that takes long",
            "where core dumps go is a setting of the whole machine"),
    NotMade("uninterruptible", "a child in the hands of a disk that does not answer",
            "it takes a file system that hangs; frozen-and-killed is as immune to a kill"),
    NotMade("double-verdict", "two deadlines of one child in one moment",
            "one state machine decides; its model tests have every order of events"),
    NotMade("clock-steps", "the wall clock is set",
            "it is the clock of the whole machine; no decision reads it"),
    NotMade("pid-reuse", "a pid is used again",
            "the largest pid is a setting of the whole machine"),
    NotMade("reaped-by-others", "somebody else reaps our child",
            "nothing in the watchdog can; traced-and-killed is an end with an unknown status"),
    NotMade("slow-disk", "writes that take half a minute",
            "it takes a file system that stalls; pause-log stalls the one child that writes"),
    NotMade("no-proc", "/proc is hidden", "it takes a mount namespace around the whole laboratory; "
            "the judge is tested without facts"),
    NotMade("address-gone", "a listening address is taken away",
            "the laboratory's is 127.0.0.1, which is everybody's"),
    NotMade("tap-gone", "the device of a bridge is deleted",
            "it would appear in the operator's network; the system's tests do it in a namespace"),
    NotMade("process-1", "the watchdog is process 1 of a container",
            "it takes a pid namespace around the whole laboratory; the system's tests do it"),
    NotMade("rare-crashes", "a crash every ten minutes",
            "it takes hours; the policy's tests move the clock"),
    NotMade("dependency-down", "a server that we depend on is down", "there is none"),
    NotMade("ports-refused", "ports below 1024 for an ordinary user",
            "the laboratory wants one port above them; tests of the listeners"),
    NotMade("systemd", "freeze, thaw, stop and kill by systemd",
            "the laboratory is not a unit; see the faults of the same effect"),
    NotMade("long-frames", "a beat that claims to be endless",
            "beats have one size and no length in them; see garbage and partial"),
    NotMade("denied-evidence", "yama, seccomp or SELinux deny what a report needs",
            "policies of the whole machine; each source of a report is optional and tested so"),
    NotMade("windows", "the console is closed, the user logs off", "there is no Windows here"),
)  # fmt: skip


def chosen(patterns: Iterable[str]) -> list[Fault]:
    """The faults whose ids fit any of the patterns, in the catalogue's order; no pattern: all.

    Raises `ValueError` naming a pattern that fits none.
    """
    wanted = list(patterns)
    for pattern in wanted:
        if not fnmatch.filter(FAULTS, pattern):
            raise ValueError(f"no fault fits {pattern!r}; --list shows them all")
    return [
        fault
        for name, fault in FAULTS.items()
        if not wanted or any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)
    ]


# Entries of the journal that are news of the whole tree and not of one child.
_NEWS = {
    "internal-error", "reload-refused", "reloaded", "report-failed", "restart-asked", "resumed",
    "spawn-failed", "upgrade-refused", "upgrade-stuck", "upgrade-undone", "upgraded",
    "watchdog-away", "watchdog-failed", "giving-up", "start-failed",
}  # fmt: skip
# Those of them that no fault may bring about unless it says so.
ALARMING = {"internal-error", "report-failed", "watchdog-failed", "giving-up", "upgrade-stuck"}
_EXCUSED = {"starved", "stopped", "traced", "frozen", "dumping"}


def class_of(entry: Mapping[str, Any]) -> str:
    """What an entry of the journal says of the cause: "core blocked", "reloaded", or nothing."""
    event, child = entry.get("event"), entry.get("child")
    if event in ("condemned", "verdict"):
        return "" if entry["verdict"] == "ok" else f"{child} {entry['verdict']}"
    if event == "state":
        if entry.get("why") in ("crash", "clean") and entry.get("state") not in ("up", "stopping"):
            return f"{child} {DEAD}"
        if entry.get("why") == START_TIMEOUT and entry.get("state") == "stopping":
            return f"{child} {START_TIMEOUT}"
    return str(event) if event in _NEWS else ""


def harmless(word: str) -> bool:
    """Whether a class that nobody expected is no harm: an excuse of somebody who is well."""
    return word not in ALARMING and (word in _NEWS or word.rpartition(" ")[2] in _EXCUSED)
