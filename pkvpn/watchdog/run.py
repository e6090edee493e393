"""From a spec to a running tree: what is done once in a process that becomes a watchdog."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

from pkvpn.watchdog import instance, sandbox, sweep, upgrade
from pkvpn.watchdog.child import ALL_SIGNALS, set_oom_score
from pkvpn.watchdog.spec import TreeSpec
from pkvpn.watchdog.supervisor import EXIT_INTERNAL, EXIT_OK, EXIT_START_FAILED, Report, Supervisor
from pkvpn.watchdog.titles import set_title


def run_tree(
    spec: TreeSpec,
    *,
    tell: Report = lambda _line: None,
    on_reload: Callable[[], TreeSpec] | None = None,
    status: Callable[[], dict[str, Any]] | None = None,
    resume_fd: int | None = None,
) -> int:
    """Be the watchdog of ``spec`` until a stop; returns the exit code.

    ``tell`` gets one dict at a time for whoever waits for the start: {"progress": text},
    {"ready": True, ...}, {"error": text, "code": n} or {"already": pid}.
    ``resume_fd``: the table of the image before an upgrade.
    """
    # Whoever hits us while we start is answered as soon as there is somebody who can.
    signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)
    _fill_standard_streams()
    _raise_descriptor_limit()
    set_title(spec.title or spec.name, spec.comm or spec.name)
    if resume_fd is not None:
        table = upgrade.read_table(resume_fd)
        lock_path = os.path.join(spec.runtime_dir, instance.LOCK_NAME)
        lock = instance.InstanceLock.adopt(table["lock"], lock_path)
        supervisor = Supervisor(spec, lock=lock, tell=tell, on_reload=on_reload, status=status)
        return supervisor.resume(table, resume_fd)
    try:
        taken = _take_over(spec, tell)
    except (instance.InstanceError, OSError) as error:
        tell({"error": str(error), "code": EXIT_START_FAILED})
        return EXIT_START_FAILED
    if isinstance(taken, int):
        return taken
    _raise_priority(spec.nice)
    if spec.oom_score_adj:
        set_oom_score(spec.oom_score_adj)
    if spec.capabilities is not None:
        sandbox.keep_capabilities(spec.capabilities)
    supervisor = Supervisor(spec, lock=taken, tell=tell, on_reload=on_reload, status=status)
    try:
        return supervisor.run()
    except BaseException as error:  # noqa: BLE001 - a bug of ours; the children must not hang on
        # Not sys.exit: at exit multiprocess would wait for children that nobody judges any
        # more.  They end by the death signal.
        tell({"error": f"the watchdog failed: {type(error).__name__}: {error}",
              "code": EXIT_INTERNAL})  # fmt: skip
        sys.excepthook(type(error), error, error.__traceback__)
        os._exit(EXIT_INTERNAL)


def _take_over(spec: TreeSpec, tell: Report) -> instance.InstanceLock | int:
    """The lock of the instance, or the exit code if it cannot be had."""
    for directory in (spec.runtime_dir, spec.state_dir):
        instance.prepare_directory(directory)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise instance.InstanceError(f"{directory} cannot be written to")
    left: list[str] = []
    lock = sweep.take_over(spec.runtime_dir, left.append)
    if lock is not None:
        instance.write_pid_file(os.path.join(spec.runtime_dir, instance.PID_NAME))
        return lock
    pid = instance.watchdog_pid(os.path.join(spec.runtime_dir, instance.LOCK_NAME))
    if pid is not None:
        tell({"already": pid})
        return EXIT_OK
    tell({"error": "what was left cannot be ended: " + "; ".join(left),
          "code": EXIT_START_FAILED})  # fmt: skip
    return EXIT_START_FAILED


def _fill_standard_streams() -> None:
    """No pipe of ours is to get a number into which somebody prints."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _raise_descriptor_limit() -> None:
    """All that the children give lies here; what we may have, we take."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _raise_priority(nice: int) -> None:
    if nice:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, nice)
