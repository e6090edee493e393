"""A process-tree framework: child specs in, a supervised tree out.

    from pkvpn.watchdog import Child, ChildSpec, TreeSpec, run_tree

    def work(child: Child) -> None:
        child.ready()
        while not child.stopping:
            child.wait()  # beats, and returns at least as often as the watchdog wants to hear

    spec = TreeSpec("example", (ChildSpec("worker", work),), "/run/user/1000/ex", "/tmp/ex")
    raise SystemExit(run_tree(spec))

Strategy: names are imported when they are first used, so that a command line tool that only
asks the control socket pays for nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pkvpn.watchdog.child import Child
    from pkvpn.watchdog.control import ControlError, ask
    from pkvpn.watchdog.lifeline import Duty
    from pkvpn.watchdog.policy import OnLimit, RestartPolicy
    from pkvpn.watchdog.run import run_tree
    from pkvpn.watchdog.spec import ChildSpec, HeldSpec, Restart, TreeSpec

_HOMES = {
    "Child": "child",
    "Duty": "lifeline",
    "ControlError": "control",
    "ask": "control",
    "OnLimit": "policy",
    "RestartPolicy": "policy",
    "ChildSpec": "spec",
    "HeldSpec": "spec",
    "Restart": "spec",
    "TreeSpec": "spec",
    "run_tree": "run",
}

__all__ = [
    "Child",
    "ChildSpec",
    "ControlError",
    "Duty",
    "HeldSpec",
    "OnLimit",
    "Restart",
    "RestartPolicy",
    "TreeSpec",
    "ask",
    "run_tree",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
