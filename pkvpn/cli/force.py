"""`kill`: the end by force.

Strategy: nothing is asked of the service and nothing is started; what is to be killed is found by
the lock, and the watchdog goes first.  Works while the service hangs, is stopped, or memory is
short.
"""

import argparse
import contextlib

from pkvpn.cli import FAILED, OK, Command, complain
from pkvpn.cli.runtime import is_running, load_settings


def _kill(args: argparse.Namespace) -> int:
    from pkvpn.watchdog.sweep import kill_tree

    settings = load_settings(args.config)
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
