"""`start`, `stop`, `restart`, `reload`, `upgrade` and `execsvc`.

Strategy: whether the service runs is asked of the instance lock and of nothing else; the pid file
only says whom to wait for.  Each wait has a limit, and what it waited for is named when the limit
is reached.  A stop is over when the last process has let go of the lock.

Where the instance is installed in an init system that supervises it, starts and stops go through
that: else it would take a stop for a failure, or not know of a start.
"""

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pkvpn.cli import FAILED, NO_PRIVILEGE, NOT_RUNNING, OK, Command, Refusal, complain
from pkvpn.cli.runtime import holders, is_running, load_settings, open_watchdog
from pkvpn.config import ConfigError, Settings, load
from pkvpn.service.inits import is_restarting, managing
from pkvpn.service.manager import Manager, ManagerError, call
from pkvpn.watchdog import needs
from pkvpn.watchdog.control import ControlError, ask

STARTED = "PacketiX VPN Server Service Started."
STOPPED = "PacketiX VPN Server Service Stopped."

# What the watchdog promises is 0.1 s; an overloaded machine gets some more.
ANSWER_TIMEOUT = 2.0

# What `start` waits for news beyond the time that a child has for its start.
_PATIENCE = 5.0

# What children of a dead watchdog promise is 1 s.
_NOTICE_TIMEOUT = 2.0

# How often a condition is looked at that nobody announces: the lock, and the state of another's
# start or stop.  A lock look-up costs 20 us.
_LOOK_EVERY = 0.01


# --- start ---------------------------------------------------------------------------------------


def _start_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--foreground",
        action="store_true",
        help="stay in this terminal and log to it; ^C stops the service",
    )
    _sandbox_argument(parser)


def _sandbox_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-sandbox",
        action="store_true",
        help="no Landlock and no seccomp, to find out why something fails",
    )


def _start(args: argparse.Namespace) -> int:
    check_needs()
    settings = load_settings(args.config)
    running = _wait_while_it_changes(settings)
    if running is not None:
        return _already(running)
    if args.foreground:
        from pkvpn.app import execsvc

        return execsvc(settings, foreground=True, no_sandbox=args.no_sandbox)
    manager = _manager(settings)
    if manager is not None:
        if args.no_sandbox:
            raise Refusal(f"what {manager.name} runs has a sandbox; to do without, `vpnserver start"
                          " --foreground --no-sandbox`")  # fmt: skip
        return _start_through(manager, settings)
    answer = _launch(settings, no_sandbox=args.no_sandbox)
    if "already" in answer:
        # Another start was quicker.  It may not serve yet, and we promise that it does.
        return _already(_wait_while_it_changes(settings) or int(answer["already"]))
    if "error" in answer:
        complain(f"the service did not start: {answer['error']}")
        return int(answer.get("code", FAILED))
    _tell_refused(answer)
    _explain_lingering(settings)
    print(STARTED)
    return OK


def check_needs() -> None:
    """Raises Refusal where the service cannot run, whatever is configured."""
    missing = needs.missing()
    if missing:
        raise Refusal("the service cannot run on this system, which lacks " + "; ".join(missing))


def _tell_refused(answer: dict[str, Any]) -> None:
    for listener in answer.get("listeners", ()):
        if listener["state"] == "refused":
            complain(f"{_address(listener)} is refused: {listener['error']}")


def _already(pid: int) -> int:
    print(f"The service is already running (pid {pid}).")
    return OK


def _address(listener: dict[str, Any]) -> str:
    from pkvpn.config import Address

    return str(Address(listener["address"], listener["port"]))


def _wait_while_it_changes(settings: Settings) -> int | None:
    """Let a stop end and another's start get ready; return the pid of a service that runs then.

    None says that a service is to be launched: it decides by the lock what is really there.
    """
    deadline = time.monotonic() + stop_budget(settings)
    while is_running(settings):
        try:
            status = ask(str(settings.control_socket), "status", timeout=ANSWER_TIMEOUT)
        except (OSError, ControlError):
            # No watchdog that answers: a service that is only beginning or ending, or leftovers
            # that the next one sweeps.  execsvc finds out which.
            return None
        if status["state"] not in ("starting", "stopping"):
            return int(status["watchdog"]["pid"])
        if time.monotonic() > deadline:
            raise Refusal(
                f"a service (pid {status['watchdog']['pid']}) has been {status['state']} for "
                f"{stop_budget(settings):g} s; look at `status`, end it with `kill`"
            )
        time.sleep(_LOOK_EVERY)
    return None


def _launch(settings: Settings, *, no_sandbox: bool) -> dict[str, Any]:
    """Start execsvc away from this terminal and return its last word."""
    answers, word = os.pipe()
    try:
        command = [*_beside_login(settings), *_execsvc_command(settings, word)]
        _spawn_detached([*command, *(["--no-sandbox"] if no_sandbox else [])], keep=word)
    finally:
        os.close(word)
    try:
        return _last_word(settings, answers)
    except KeyboardInterrupt:
        complain("interrupted; the service goes on with its start: look at `status`")
        raise
    finally:
        os.close(answers)


def _execsvc_command(settings: Settings, ready_fd: int) -> list[str]:
    config = ["--config", str(settings.source)] if settings.source else []
    return [sys.executable, "-m", "pkvpn", *config, "execsvc", "--ready-fd", str(ready_fd)]


def _spawn_detached(command: list[str], *, keep: int) -> None:
    """Run a command in a session of its own, without a terminal and without this parent.

    The second fork makes it a child of init and not the leader of its session, so it can never
    get a terminal again.
    """
    try:
        between = os.fork()
    except OSError as error:
        raise Refusal(f"the service did not start: no process could be made: {error}") from None
    if between:
        _, status = os.waitpid(between, 0)
        if status:
            raise Refusal("the service did not start: no second process could be made")
        return
    code = 1
    try:
        os.setsid()
        if os.fork():
            code = 0
        else:
            nothing = os.open(os.devnull, os.O_RDWR)
            for number in range(3):
                os.dup2(nothing, number)
            # Whoever started us may wait for the end of a pipe that we have got from him.
            os.closerange(3, keep)
            os.closerange(keep + 1, os.sysconf("SC_OPEN_MAX"))
            os.set_inheritable(keep, True)
            os.execv(command[0], command)
    finally:
        # Also after an exception: this copy must never return into the caller's code.
        os._exit(code)


def _last_word(settings: Settings, answers: int) -> dict[str, Any]:
    """Show progress until the service is ready or says why not; each line is a JSON object.

    The time-out counts from the last news, so that slow steps add up and silence does not.
    """
    patience = settings.watchdog.start_timeout + _PATIENCE
    deadline = time.monotonic() + patience
    progress, waiting = "nothing yet", b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([answers], [], [], left)[0]:
            raise Refusal(
                f"the service is not ready after {patience:g} s; the last it said: {progress}. "
                f"It goes on trying: look at `status` and at {settings.service.log_file}"
            )
        data = os.read(answers, 65536)
        if not data:
            raise Refusal(
                f"the service ended while it started; the last it said: {progress}. "
                f"Look at {settings.service.log_file}"
            )
        *lines, waiting = (waiting + data).split(b"\n")
        for line in lines:
            answer: dict[str, Any] = json.loads(line)
            if "progress" not in answer:
                return answer
            progress = answer["progress"]
            complain(progress)
            deadline = time.monotonic() + patience


def _is_ended_with_login(settings: Settings) -> bool:
    """Whether logind ends all that this login leaves behind."""
    if settings.mode != "user" or "XDG_SESSION_ID" not in os.environ:
        return False
    root = Path("/etc/systemd")
    kills = False
    for file in (root / "logind.conf", *sorted(root.glob("logind.conf.d/*.conf"))):
        with contextlib.suppress(OSError):
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                key, _, value = line.partition("=")
                if key.strip() == "KillUserProcesses":
                    kills = value.strip().lower() in ("1", "yes", "true", "on")
    return kills


def _lingers() -> bool:
    return Path("/var/lib/systemd/linger", os.environ.get("USER") or "-").exists()


def _beside_login(settings: Settings) -> list[str]:
    """What runs a command as nothing of this login, where that is needed and allowed.

    Who lingers has a systemd that stays; of the login itself nothing would, lingering or not.
    """
    if _is_ended_with_login(settings) and _lingers():
        program = shutil.which("systemd-run")
        if program:
            return [program, "--user", "--scope", "--quiet", "--collect", "--"]
    return []


def _explain_lingering(settings: Settings) -> None:
    """Say so where logind would end the service together with the login."""
    if _is_ended_with_login(settings) and not _lingers():
        complain(
            "logind ends your processes when you log out (KillUserProcesses=yes); "
            "`loginctl enable-linger` and then `vpnserver restart` lets the service go on"
        )


# --- through an init system ----------------------------------------------------------------------


def _manager(settings: Settings) -> Manager | None:
    """Whom starts and stops go through; None: they are ours, also where somebody has started the
    service by hand."""
    manager = managing(str(settings.service.runtime_dir))
    try:
        if manager is None or (is_running(settings) and not manager.runs_it()):
            return None
    except ManagerError as error:
        complain(f"{manager.name if manager else ''} is passed over: {error}")
        return None
    return manager


def _ask(manager: Manager, verb: str, settings: Settings) -> None:
    """Raises Refusal."""
    try:
        call(manager.verbs[verb], start_budget(settings) + stop_budget(settings))
    except ManagerError as error:
        raise Refusal(f"{error}\nthe reason may be in {manager.journal}") from None


def _start_through(manager: Manager, settings: Settings) -> int:
    _ask(manager, "start", settings)
    _tell_refused(wait_until_it_serves(settings))
    print(STARTED)
    return OK


def wait_until_it_serves(settings: Settings) -> dict[str, Any]:
    """Return its status then; most init systems call a process started that only begins."""
    deadline = time.monotonic() + start_budget(settings)
    while True:
        with contextlib.suppress(OSError, ControlError):
            status: dict[str, Any] = ask(
                str(settings.control_socket), "status", timeout=ANSWER_TIMEOUT
            )
            if status["state"] not in ("starting", "stopping"):
                return status
        if time.monotonic() > deadline:
            raise Refusal(
                f"the service does not serve after {start_budget(settings):g} s; look at `status`"
                f" and at {settings.service.log_file}"
            )
        time.sleep(_LOOK_EVERY)


def _stop_through(manager: Manager, settings: Settings) -> None:
    _ask(manager, "stop", settings)
    wait_until_it_ended(settings, time.monotonic() + stop_budget(settings))


# --- stop ----------------------------------------------------------------------------------------


def _no_arguments(_parser: argparse.ArgumentParser) -> None:
    pass


def _stop(args: argparse.Namespace) -> int:
    settings = load_settings(args.config)
    was_running = is_running(settings)
    manager = _manager(settings)
    if manager is not None:
        # Also where none of it runs: it may be about to be started anew, or by a connection.
        _stop_through(manager, settings)
    if not was_running:
        return _not_running()
    if manager is None:
        _stop_and_wait(settings)
    print(STOPPED)
    return OK


def _not_running() -> int:
    print("The service is not running.")
    return OK


def _stop_and_wait(settings: Settings) -> None:
    """End the service; return when the lock is free, raise Refusal naming what is left."""
    deadline = time.monotonic() + stop_budget(settings)
    watchdog = _ask_to_stop(settings)
    if watchdog is not None:
        try:
            waiter = select.poll()
            waiter.register(watchdog, select.POLLIN)
            waiter.poll(max(0.0, deadline - time.monotonic()) * 1000)
        finally:
            os.close(watchdog)
    wait_until_it_ended(settings, deadline)


def wait_until_it_ended(settings: Settings, deadline: float) -> None:
    """Raises Refusal naming what is left."""
    if not _wait_until(lambda: not is_running(settings), deadline):
        raise Refusal(
            f"the service has not ended within {stop_budget(settings):g} s; still there: "
            f"{_pids(holders(settings))}; `kill` ends it by force"
        )


def _ask_to_stop(settings: Settings) -> int | None:
    """Ask over the control socket, or else with a signal; return the living watchdog's pidfd."""
    watchdog = open_watchdog(settings)
    try:
        ask(str(settings.control_socket), "stop", timeout=ANSWER_TIMEOUT)
    except ControlError as error:
        raise Refusal(f"the watchdog refuses to stop: {error}") from None
    except OSError as error:
        if watchdog is not None:
            _terminate(watchdog)
        # Children of a watchdog that just died notice it and end.
        elif not _wait_until(lambda: not is_running(settings), time.monotonic() + _NOTICE_TIMEOUT):
            raise Refusal(
                f"no watchdog answers ({error}), but the lock is held by "
                f"{_pids(holders(settings))}; `kill` ends what is left"
            ) from None
    return watchdog


def _terminate(watchdog: int) -> None:
    """Send the signal that asks for the same as `stop`, also to one that somebody has stopped."""
    try:
        signal.pidfd_send_signal(watchdog, signal.SIGTERM)
        signal.pidfd_send_signal(watchdog, signal.SIGCONT)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise Refusal("the service belongs to another user", NO_PRIVILEGE) from None


def stop_budget(settings: Settings) -> float:
    """Return the seconds in which every stop ends.

    One child after the other may use all of its time, then be killed; the rest is for the
    machine.
    """
    children = 3 + settings.edge_processes(os.cpu_count() or 1)
    return children * (settings.watchdog.stop_timeout + 1.0) + 5.0


def start_budget(settings: Settings) -> float:
    """Return the seconds in which every start ends, one child after the other."""
    children = 3 + settings.edge_processes(os.cpu_count() or 1)
    return children * settings.watchdog.start_timeout + _PATIENCE


def _wait_until(condition: Callable[[], bool], deadline: float) -> bool:
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_EVERY)
    return True


def _pids(pids: list[int]) -> str:
    return "pid " + ", ".join(map(str, pids)) if pids else "a process that cannot be seen"


def _restart_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "child",
        nargs="?",
        metavar="NAME",
        help="replace this child only, such as core or edge-1; nobody is cut off",
    )


def _restart(args: argparse.Namespace) -> int:
    check_needs()
    settings = load_settings(args.config)
    if getattr(args, "child", None) is not None:
        return _restart_child(settings, args.child)
    if is_running(settings):
        manager = _manager(settings)
        if manager is not None:
            if "restart" not in manager.verbs:
                _stop_through(manager, settings)
                print(STOPPED, flush=True)
                return _start_through(manager, settings)
            _ask(manager, "restart", settings)
            print(STOPPED)
            print(STARTED)
            return OK
        _stop_and_wait(settings)
        print(STOPPED, flush=True)
    elif args.verb == "try-restart":
        return _not_running()
    return _start(argparse.Namespace(config=args.config, foreground=False, no_sandbox=False))


def _restart_child(settings: Settings, name: str) -> int:
    """Have one child replaced; return when its successor serves."""
    before = _child(_request(settings, "status", ANSWER_TIMEOUT), name)
    _request(settings, "restart", ANSWER_TIMEOUT, {"name": name})
    limit = settings.watchdog.stop_timeout + settings.watchdog.start_timeout + _PATIENCE
    deadline, now = time.monotonic() + limit, before
    while time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY)
        if not is_running(settings):
            raise Refusal(f"restart {name}: the service has been stopped meanwhile")
        with contextlib.suppress(OSError, ControlError):
            status = ask(str(settings.control_socket), "status", timeout=ANSWER_TIMEOUT)
            now = _child(status, name)
            if now.get("state") == "up" and now["pid"] != before.get("pid"):
                print(f"{name} has been replaced (pid {now['pid']}).")
                return OK
    raise Refusal(
        f"restart {name}: {now.get('state')} after {limit:g} s; look at `status` and `events`"
    )


def _child(status: dict[str, Any], name: str) -> dict[str, Any]:
    return next((one for one in status["children"] if one["name"] == name), {})


# --- reload, upgrade -----------------------------------------------------------------------------


def _reload_arguments(parser: argparse.ArgumentParser) -> None:
    # What the unit itself calls: of the watchdog, not of systemd.
    parser.add_argument("--direct", action="store_true", help=argparse.SUPPRESS)


def _reload(args: argparse.Namespace) -> int:
    settings = load_settings(args.config)  # a file that is wrong is refused here already
    manager = _manager(settings) if is_running(settings) and not args.direct else None
    if manager is None or "reload" not in manager.verbs:
        _request(settings, "reload", 30.0)
    else:
        _ask(manager, "reload", settings)
    print("The configuration has been read again.")
    if args.direct:
        return OK
    _tell_concerned(settings)
    return OK


def _tell_concerned(settings: Settings) -> None:
    """Say whose sessions a new certificate will end."""
    from pkvpn.edge import certificate  # here, since only this verb needs it

    try:
        shown = certificate.load(*settings.certificate_files)
        args = {"fingerprint": shown}
        concerned = ask(str(settings.admin_socket), "session.certificate", args, ANSWER_TIMEOUT)
    except certificate.CertificateError as error:
        complain(f"the certificate in use stays: {error}")
        return
    except (OSError, ControlError) as error:
        complain(f"which sessions a new certificate concerns is not known: {error}")
        return
    count, names = concerned["concerned"], ", ".join(concerned["sessions"])
    if count:
        more = ", ..." if count > len(concerned["sessions"]) else ""
        print(
            f"{count} sessions have connections that were shown another certificate. SoftEther's"
            " client ends such a session when it makes one more connection, and logs in again:"
            f" {names}{more}"
        )


# The new program is tried, taken over, and then each child is replaced: as long as the slowest of
# starts and stops of all of them may take, and the trial (30 s at most) before that.
_TRIAL_TIMEOUT = 35.0


def _upgrade(args: argparse.Namespace) -> int:
    settings = load_settings(args.config)
    _request(settings, "upgrade", ANSWER_TIMEOUT)
    deadline = time.monotonic() + _TRIAL_TIMEOUT
    state, pid = "trying", 0
    while state in ("trying", "replacing children"):
        time.sleep(_LOOK_EVERY)
        try:
            status = ask(str(settings.control_socket), "status", timeout=ANSWER_TIMEOUT)
        except (OSError, ControlError):  # between the images nobody answers
            if not is_running(settings):
                raise Refusal("the service has been stopped meanwhile") from None
        else:
            state, pid = status["watchdog"]["upgrade"], status["watchdog"]["pid"]
            if state == "replacing children":
                deadline = max(deadline, time.monotonic() + stop_budget(settings))
        if time.monotonic() > deadline:
            raise Refusal(f"the upgrade is not through: {state}; look at `status` and `events`")
    if state.startswith("failed: "):
        raise Refusal(f"upgrade refused, the service goes on as it was: {state[8:]}")
    print(f"The service (pid {pid}) goes on with the installed program.")
    return OK


def _request(
    settings: Settings, verb: str, timeout: float, args: dict[str, Any] | None = None
) -> Any:
    if not is_running(settings):
        raise Refusal("the service is not running", NOT_RUNNING)
    try:
        return ask(str(settings.control_socket), verb, args, timeout=timeout)
    except ControlError as error:
        raise Refusal(f"{verb}: {error}") from None
    except OSError as error:
        raise Refusal(f"{verb}: the watchdog does not answer: {error}") from None


# --- execstop ------------------------------------------------------------------------------------


def _execstop_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--user", action="store_true", help=argparse.SUPPRESS)


def _execstop(args: argparse.Namespace) -> int:
    """Say to the watchdog what kind of end it is; systemd sends it a TERM after this."""
    if is_restarting(args.user):
        settings = load_settings(args.config)
        with contextlib.suppress(OSError, ControlError):
            ask(str(settings.control_socket), "stop", {"yield": True}, timeout=ANSWER_TIMEOUT)
    return OK


# --- execsvc -------------------------------------------------------------------------------------


def _execsvc_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check",
        action="store_true",
        help="only see whether this program would start: exit code 0, or the reason",
    )
    _sandbox_argument(parser)
    # Where `start` waits for our word.
    parser.add_argument("--ready-fd", type=int, metavar="N", help=argparse.SUPPRESS)
    # What the image before an upgrade left for us.
    parser.add_argument("--resume-fd", type=int, metavar="N", help=argparse.SUPPRESS)


def _execsvc(args: argparse.Namespace) -> int:
    check_needs()
    try:
        settings = load(args.config)
    except ConfigError as error:
        # Between `start` and us the file may have changed.
        if args.ready_fd is not None:
            word = json.dumps({"error": str(error), "code": 6}) + "\n"
            with contextlib.suppress(OSError):
                os.write(args.ready_fd, word.encode())
        raise
    from pkvpn.app import execsvc

    return execsvc(
        settings,
        ready_fd=args.ready_fd,
        check=args.check,
        resume_fd=args.resume_fd,
        no_sandbox=args.no_sandbox,
    )


COMMANDS = {
    "start": Command(_start_arguments, _start),
    "stop": Command(_no_arguments, _stop),
    "restart": Command(_restart_arguments, _restart),
    "try-restart": Command(_no_arguments, _restart),
    "reload": Command(_reload_arguments, _reload),
    "force-reload": Command(_reload_arguments, _reload),
    "upgrade": Command(_no_arguments, _upgrade),
    "execstop": Command(_execstop_arguments, _execstop),
    "execsvc": Command(_execsvc_arguments, _execsvc),
}
