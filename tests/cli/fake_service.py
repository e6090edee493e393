"""A service that only has what the command line sees of it: locks, pid file and two sockets.

    fake_service.py RUNTIME_DIR STOP_TAKES [ready-fd]

STOP_TAKES are the seconds between the request to stop and its end; "never" ignores the request.
With a ready-fd it says on it that it is ready, as execsvc does.
"""

import json
import os
import selectors
import signal
import sys
import time
from typing import Any

from pkvpn.watchdog import control, instance

STATUS: dict[str, Any] = {
    "state": "up",
    "mode": "user",
    "watchdog": {"pid": os.getpid(), "uptime": 3725.0},
    "children": [
        {
            "name": "core",
            "pid": 4242,
            "state": "up",
            "why": "crash",
            "verdict": "ok",
            "restarts": 3,
            "uptime": 75.5,
            "last_beat_age": 0.112,
            "loop_lag": 0.002,
            "cpu": 1.5,
            "rss": 31457280,
            "fds": 17,
        },
        {"name": "edge-1", "pid": None, "state": "backoff", "restarts": 9},
    ],
    "listeners": [
        {"address": "0.0.0.0", "port": 8888, "state": "listening", "error": ""},
        {"address": "::", "port": 443, "state": "refused", "error": "Permission denied"},
    ],
}


SESSIONS = [{"hub": "T", "name": f"SID-{number}", "user": "u1"} for number in range(5)]


def core_answer(verb: str, args: dict[str, Any]) -> Any:
    """What the core says on its own socket; two sessions in one answer."""
    if verb == "status":
        return {"sessions": len(SESSIONS)}
    if verb == "session.list":
        keys = [f"{session['hub']}\0{session['name']}" for session in SESSIONS]
        first = keys.index(args["after"]) + 1 if "after" in args else 0
        return SESSIONS[first : first + 2]
    raise control.ControlError(f"{verb} is refused: {json.dumps(args, sort_keys=True)}")


def main(runtime: str, stop_takes: str, ready_fd: int | None) -> None:
    lock = instance.InstanceLock.acquire(os.path.join(runtime, "lock"))
    if lock is None:
        raise SystemExit("the lock is taken")
    pid_file = os.path.join(runtime, "pid")
    instance.write_pid_file(pid_file)
    end_at = float("inf")

    def stop() -> None:
        nonlocal end_at
        STATUS["state"] = "stopping"
        if stop_takes != "never":
            end_at = min(end_at, time.monotonic() + float(stop_takes))

    def answer(verb: str, args: dict[str, Any]) -> Any:
        if verb == "status":
            return STATUS
        if verb == "stop":
            stop()
            return {"stopping": True}
        if verb == "reload":
            return {"replaced": ["edge-1"]}
        if verb == "restart":
            children = {child["name"]: child for child in STATUS["children"]}
            if args["name"] not in children:
                raise control.ControlError(f"no child is named {args['name']!r}")
            if args["name"] == "core":
                children["core"]["pid"] += 1
            return {"name": args["name"]}
        raise control.ControlError(f"not now: {verb}")

    signal.signal(signal.SIGTERM, lambda *_: stop())
    waker, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    selector = selectors.DefaultSelector()
    selector.register(waker, selectors.EVENT_READ)
    listener = control.listen(os.path.join(runtime, "control.sock"))
    watchdog = control.ControlServer(listener, selector, answer)
    admin = control.listen(os.path.join(runtime, "admin.sock"))
    core = control.ControlServer(admin, selector, core_answer)
    if ready_fd is not None:
        word = {"ready": True, "pid": os.getpid(), "listeners": STATUS["listeners"]}
        os.write(ready_fd, json.dumps(word).encode() + b"\n")
        os.close(ready_fd)
    while time.monotonic() < end_at:
        for key, mask in selector.select(min(0.5, end_at - time.monotonic())):
            if not (watchdog.handle(key, mask) or core.handle(key, mask)):
                os.read(waker, 100)
    os.unlink(pid_file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)
