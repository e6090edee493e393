"""`install` and `uninstall`: the service in the machine's init system.

Strategy: first all that can be refused, then the files, then the init system's commands; each step
can be repeated.  `--dry-run` prints the files and the commands and does nothing, on any machine.
"""

import argparse
import os
import shlex
import site
import stat
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pkvpn.cli import BAD_ARGUMENTS, FAILED, NO_PRIVILEGE, OK, Command, Refusal, complain
from pkvpn.cli.runtime import is_running, load_settings
from pkvpn.cli.service import (
    STARTED,
    check_needs,
    start_budget,
    stop_budget,
    wait_until_it_ended,
    wait_until_it_serves,
)
from pkvpn.config import CORE_USER, EDGE_USER, Settings, make_directories
from pkvpn.service import units
from pkvpn.service.inits import INITS, all_inits, systemd_of_user
from pkvpn.service.manager import Command as Line
from pkvpn.service.manager import Manager, ManagerError, call
from pkvpn.users import UserError, commands_to_make, make_users

# Above what the tree needs for a stop of its own, so that systemd kills nobody who was about to.
_STOP_MARGIN = 10.0
# Listening sockets, checkpoints, TAPs and the like.
_HELD_MOST = 500
_LOOK_EVERY = 0.1


def _install_arguments(parser: argparse.ArgumentParser) -> None:
    _common_arguments(parser)
    parser.add_argument(
        "--manual", action="store_true", help="neither start it now nor with the machine"
    )
    parser.add_argument(
        "--kill-is-final",
        action="store_true",
        help="a watchdog that somebody kills (kill -KILL) is not started anew",
    )
    parser.add_argument(
        "--socket-activation",
        action="store_true",
        help="systemd listens on the addresses, and starts the service for who comes",
    )


def _common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="only print what would be done")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--user", action="store_true", help="in your own systemd, with your rights: User Mode"
    )
    where.add_argument("--init", choices=INITS, help="in this init system, not the one that runs")


def _install(args: argparse.Namespace) -> int:
    settings = load_settings(args.config)
    manager = _manager(args)
    plan = _plan(settings, args, manager)
    files = manager.files(plan)
    begin = (*manager.begin(plan), *(() if plan.manual else manager.start))
    users = [] if args.user else _usual_users(settings)
    if args.dry_run:
        for path, text in files.items():
            print(f"# {path}\n{text}")
        _print(*commands_to_make(users), *begin)
        return OK
    check_needs()
    _check_authority(manager, args.user)
    try:
        was = manager.runs_it()
    except ManagerError:
        was = False
    if is_running(settings) and not was:
        raise Refusal(f"the service runs already, without {manager.name}: `vpnserver stop` ends it,"
                      " then install")  # fmt: skip
    _warn_of_writers(settings)
    try:
        for name in make_users(users):
            print(f"Made the system user {name}.")
        make_directories(settings)
        changed = manager.write(files)
        for line in begin:
            _call_as_soon_as_noticed(manager, line, plan.start_timeout + _STOP_MARGIN)
    except UserError as error:
        raise Refusal(f"not installed: {error}", FAILED) from None
    except ManagerError as error:
        raise Refusal(f"not installed: {error}; the reason may be in {manager.journal}",
                      FAILED) from None  # fmt: skip
    print(f"Installed: {', '.join(map(str, files))}.")
    if was and changed:
        print("It runs already; `vpnserver restart` goes over to what is installed now.")
    elif not plan.manual:
        wait_until_it_serves(settings)
        print(STARTED)
    if args.user:
        _explain_lingering()
    return OK


def _call_as_soon_as_noticed(manager: Manager, line: Line, timeout: float) -> None:
    """Raises ManagerError."""
    deadline = time.monotonic() + manager.notices_within
    while True:
        try:
            call(line, timeout)
        except ManagerError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_EVERY)
        else:
            return


def _print(*lines: Sequence[str]) -> None:
    for line in lines:
        print(shlex.join(line))


def _usual_users(settings: Settings) -> list[str]:
    """Those as which core and edges run, where the configuration names no others."""
    service = settings.service
    named = ((CORE_USER, service.core_user), (EDGE_USER, service.edge_user))
    return [usual for usual, name in named if name is None]


def _uninstall(args: argparse.Namespace) -> int:
    settings = load_settings(args.config)
    manager = _manager(args, installed=str(settings.service.runtime_dir))
    files = manager.installed()
    if args.dry_run:
        _print(*(manager.end if files else ()), *(("rm", str(path)) for path in files),
               *manager.forget)  # fmt: skip
        return OK
    _check_authority(manager, args.user)
    if not files:
        print("The service is not installed.")
        return OK
    try:
        for line in manager.end:
            call(line, stop_budget(settings) + 2 * _STOP_MARGIN)
        wait_until_it_ended(settings, time.monotonic() + stop_budget(settings))
        manager.write({})
        for line in manager.forget:
            call(line)
    except ManagerError as error:
        raise Refusal(f"not uninstalled: {error}") from None
    print(f"Uninstalled. Accounts and settings are left in {settings.service.state_dir}.")
    return OK


def _manager(args: argparse.Namespace, installed: str = "") -> Manager:
    """The one that was asked for, or in which this instance is ``installed``, or that runs."""
    if args.user:
        return systemd_of_user()
    if args.init:
        return INITS[args.init]()
    managers = all_inits()
    for one in managers:
        if installed and one.instance() == installed and one.runs():
            return one
    # Where none runs systemd is as good as any to show; nothing else is done then.
    return next((one for one in managers if one.runs()), managers[0])


def _check_authority(manager: Manager, user: bool) -> None:
    """Raises Refusal; nothing has been changed then."""
    if not user and os.geteuid() != 0:
        raise Refusal(
            "Service Mode takes root's rights, and nothing has been changed. Without them there is"
            " User Mode: `vpnserver start`, or `vpnserver install --user`",
            NO_PRIVILEGE,
        )
    if not manager.runs():
        whose = f"{manager.name} of yours" if user else manager.name
        raise Refusal(f"no {whose} runs here ({manager.sign} is missing), and nothing has been"
                      " changed; `vpnserver start` works without it")  # fmt: skip
    foreign = manager.foreign()
    if foreign is not None:
        raise Refusal(f"{foreign} was not written by us; it is left as it is")


def _plan(settings: Settings, args: argparse.Namespace, manager: Manager) -> units.Plan:
    service = settings.service
    for option in ("socket_activation", "kill_is_final"):
        if getattr(args, option) and manager.name != "systemd":
            raise Refusal(f"--{option.replace('_', '-')}: {manager.name} has nothing like it",
                          BAD_ARGUMENTS)  # fmt: skip
    config = ("--config", str(settings.source)) if settings.source else ()
    listen: tuple[str, ...] = ()
    if args.socket_activation:
        if not all(address.port for address in service.listen):
            raise Refusal("systemd cannot choose a port: name each in [service] listen")
        listen = tuple(map(str, service.listen))
    edges = settings.edge_processes(os.cpu_count() or 1)
    return units.Plan(
        command=(sys.executable, "-m", "pkvpn", *config),
        environment=_environment(),
        runtime_dir=str(service.runtime_dir),
        state_dir=str(service.state_dir),
        log_dir=str(service.log_file.parent),
        listen=listen,
        descriptors=edges * settings.watchdog.given_max + _HELD_MOST,
        start_timeout=start_budget(settings),
        stop_timeout=stop_budget(settings) + _STOP_MARGIN,
        user=args.user,
        kill_is_final=args.kill_is_final,
        manual=args.manual,
    )


def _home() -> Path:
    """The directory in which Python finds this package."""
    return Path(__file__).resolve().parents[2]


def _environment() -> dict[str, str]:
    """A package that does not lie where this interpreter looks by itself must be named."""
    places = {
        Path(path).resolve() for path in (*site.getsitepackages(), site.getusersitepackages())
    }
    return {} if _home() in places else {"PYTHONPATH": str(_home())}


def _warn_of_writers(settings: Settings) -> None:
    """Whoever may write the program gets the rights of the service."""
    program = [Path(sys.executable).resolve(), _home() / "pkvpn"]
    if settings.source:
        program.append(settings.source)
    for path in program:
        for one in (path, *path.parents):
            found = one.stat()
            # In a directory with the sticky bit nobody replaces what is another's.
            loose = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
            if found.st_uid not in (0, os.geteuid()) or (loose and found.st_mode & 0o002):
                complain(f"{one} can be changed by others, who so get the rights of the service")
                break


def _explain_lingering() -> None:
    import pwd

    name = pwd.getpwuid(os.geteuid()).pw_name
    if not Path("/var/lib/systemd/linger", name).exists():
        complain("it ends with your last login; `loginctl enable-linger` lets it go on, and starts"
                 " it with the machine")  # fmt: skip


COMMANDS = {
    "install": Command(_install_arguments, _install),
    "uninstall": Command(_common_arguments, _uninstall),
}
