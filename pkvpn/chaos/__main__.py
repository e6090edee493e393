"""A VPN tree in the foreground that ends with who started it.

python -m pkvpn.chaos CONFIG              # as it is
python -m pkvpn.chaos CONFIG DIRECTORY    # with children that misbehave on request:
echo block > DIRECTORY/edge-1             # in this or another way of `injector.WAYS`
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
from pathlib import Path

from pkvpn.app import Service, prepare_directories
from pkvpn.chaos.injector import inject
from pkvpn.config import load
from pkvpn.watchdog.child import set_death_signal
from pkvpn.watchdog.run import run_tree
from pkvpn.watchdog.spec import TreeSpec


def main(argv: list[str]) -> int:
    """Be the watchdog until a stop; what it tells of its start goes to standard output."""
    parser = argparse.ArgumentParser(prog="python -m pkvpn.chaos", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--parent", type=int, help="end with this process, which is our parent")
    parser.add_argument("--resume-fd", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.parent:
        set_death_signal(args.parent)
    settings = load(args.config)
    service = Service(settings, foreground=True)

    def tree() -> TreeSpec:
        spec = service.tree(load(args.config))
        assert spec.upgrade is not None
        # What the new code is to be started as is this program again.
        words = [args.config, *([str(args.directory)] if args.directory else [])]
        own = dataclasses.replace(
            spec.upgrade, main="pkvpn.chaos.__main__:main", arguments=tuple(words)
        )
        spec = dataclasses.replace(spec, upgrade=own)
        return spec if args.directory is None else inject(spec, str(args.directory))

    if args.resume_fd is None:
        os.umask(0o077)
        prepare_directories(settings)
    logging.getLogger().setLevel(settings.log.level.upper())
    return run_tree(
        tree(),
        tell=_tell,
        on_reload=tree,
        status=service.status,
        resume_fd=args.resume_fd,
    )


def _tell(line: dict[str, object]) -> None:
    # Who waited for the start may be gone by the time that more is told.
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(line).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
