"""`kill`: the end by force.

Strategy: nothing is asked of the service and nothing is started; what is to be killed is found by
the lock, and the watchdog goes first.  Works while the service hangs, is stopped, or memory is
short.  An init system that would start it anew is told that it is to be down, and not waited for.
"""

import argparse
import contextlib

from pkvpn.cli import FAILED, OK, Command, complain
from pkvpn.cli.runtime import is_running, load_settings

_INIT_TIMEOUT = 2.0


def _kill(args: argparse.Namespace) -> int:
    from pkvpn.service.inits import managing
    from pkvpn.service.manager import ManagerError, call
    from pkvpn.watchdog.sweep import kill_tree

    settings = load_settings(args.config)
    manager = managing(str(settings.service.runtime_dir))
    if manager is not None:
        try:
            call(manager.verbs["kill"], _INIT_TIMEOUT)
        except ManagerError as error:
            complain(f"{manager.name} may start it anew: {error}")
    result = kill_tree(str(settings.service.runtime_dir))
    if not result.ok:
        if result.refused:
            complain(result.refused)
        for pid, why in result.survived.items():
            complain(f"{pid} is still there: {why}")
        return FAILED
    # What was ended on purpose is not "dead but left its pid file" to the next `status`.
    if not is_running(settings):
        with contextlib.suppress(OSError):
            settings.pid_file.unlink()
    return OK


COMMANDS = {"kill": Command(lambda _parser: None, _kill)}
