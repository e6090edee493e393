"""`install` and `uninstall`: the service as a unit of systemd.

Strategy: first all that can be refused, then the files, then systemd; each step can be repeated.
`--dry-run` prints the files and the commands and does nothing, on any machine.
"""

import argparse
import os
import site
import stat
import sys
from pathlib import Path

from pkvpn.cli import FAILED, NO_PRIVILEGE, OK, Command, Refusal, complain
from pkvpn.cli.runtime import is_running, load_settings
from pkvpn.cli.service import STARTED, start_budget, stop_budget
from pkvpn.config import CORE_USER, EDGE_USER, Settings, make_directories
from pkvpn.service import units
from pkvpn.service.manager import Manager, ManagerError
from pkvpn.users import UserError, commands_to_make, make_users

# Above what the tree needs for a stop of its own, so that systemd kills nobody who was about to.
_STOP_MARGIN = 10.0
# Listening sockets, checkpoints, TAPs and the like.
_HELD_MOST = 500


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
    parser.add_argument(
        "--user", action="store_true", help="in your own systemd, with your rights: User Mode"
    )


def _install(args: argparse.Namespace) -> int:
    settings = load_settings(args.config)
    manager = _manager(args.user)
    plan = _plan(settings, args)
    files = {manager.service: units.service_unit(plan)}
    names = [units.SERVICE]
    if plan.listen:
        files[manager.socket] = units.socket_unit(plan)
        names.append(units.SOCKET)
    # The sockets first: a service that listens itself would have taken their addresses.
    begin = [["daemon-reload"]]
    if not args.manual:
        begin += [["enable", *names], ["start", *reversed(names)]]
    users = [] if args.user else _usual_users(settings)
    if args.dry_run:
        for path, text in files.items():
            print(f"# {path}\n{text}")
        for command in commands_to_make(users):
            print(" ".join(command))
        for words in begin:
            print(" ".join(manager.command(*words)))
        return OK
    _check_authority(manager, args.user)
    if is_running(settings) and not _runs_it(manager):
        raise Refusal(
            "the service runs already, without systemd: `vpnserver stop` ends it, then install"
        )
    _warn_of_writers(settings)
    try:
        for name in make_users(users):
            print(f"Made the system user {name}.")
        make_directories(settings)
        changed = manager.write(files)
        was = manager.main_pid()
        for words in begin:
            manager.call(*words, timeout=plan.start_timeout + _STOP_MARGIN)
    except UserError as error:
        raise Refusal(f"not installed: {error}", FAILED) from None
    except ManagerError as error:
        raise Refusal(f"not installed: {error}; the reason may be in `journalctl -u vpnserver`",
                      FAILED) from None  # fmt: skip
    print(f"Installed: {', '.join(map(str, files))}.")
    if was and changed:
        print("It runs already; `vpnserver restart` goes over to the new unit.")
    elif not args.manual:
        print(STARTED)
    if args.user:
        _explain_lingering()
    return OK


def _usual_users(settings: Settings) -> list[str]:
    """Those as which core and edges run, where the configuration names no others."""
    service = settings.service
    named = ((CORE_USER, service.core_user), (EDGE_USER, service.edge_user))
    return [usual for usual, name in named if name is None]


def _uninstall(args: argparse.Namespace) -> int:
    settings = load_settings(args.config)
    manager = _manager(args.user)
    files = [path for path in (manager.socket, manager.service) if path.exists()]
    if args.dry_run:
        if files:
            print(" ".join(manager.command("disable", "--now", *(path.name for path in files))))
        for path in files:
            print(f"rm {path}")
        print(" ".join(manager.command("daemon-reload")))
        return OK
    _check_authority(manager, args.user)
    if not files:
        print("The service is not installed.")
        return OK
    try:
        manager.call(
            "disable", "--now", *(path.name for path in files),
            timeout=stop_budget(settings) + 2 * _STOP_MARGIN,
        )  # fmt: skip
        manager.write({})
        manager.call("daemon-reload")
    except ManagerError as error:
        raise Refusal(f"not uninstalled: {error}") from None
    print(f"Uninstalled. Accounts and settings are left in {settings.service.state_dir}.")
    return OK


def _manager(user: bool) -> Manager:
    return Manager.of_user() if user else Manager.of_system()


def _check_authority(manager: Manager, user: bool) -> None:
    """Raises Refusal; nothing has been changed then."""
    if not user and os.geteuid() != 0:
        raise Refusal(
            "Service Mode takes root's rights, and nothing has been changed. Without them there is"
            " User Mode: `vpnserver start`, or `vpnserver install --user`",
            NO_PRIVILEGE,
        )
    if not manager.runs():
        whose = "no systemd of yours" if user else "no systemd"
        raise Refusal(f"{whose} runs here, and nothing has been changed; `vpnserver start` works"
                      " without it")  # fmt: skip
    foreign = manager.foreign()
    if foreign is not None:
        raise Refusal(f"{foreign} was not written by us; it is left as it is")


def _runs_it(manager: Manager) -> bool:
    try:
        return bool(manager.main_pid())
    except ManagerError:
        return False


def _plan(settings: Settings, args: argparse.Namespace) -> units.Plan:
    service = settings.service
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
