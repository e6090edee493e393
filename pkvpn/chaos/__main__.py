"""The real VPN tree in the foreground, with children that misbehave on request.

python -m pkvpn.chaos CONFIG DIRECTORY
echo block > DIRECTORY/edge-1        # or any other way of `injector.WAYS`
"""

from __future__ import annotations

import json
import logging
import os
import sys

from pkvpn.app import Service
from pkvpn.chaos.injector import inject
from pkvpn.config import load, make_directories
from pkvpn.watchdog.supervisor import run_tree


def main(config: str, directory: str) -> int:
    settings = load(config)
    service = Service(settings, foreground=True)
    os.umask(0o077)
    make_directories(settings)
    logging.getLogger().setLevel(settings.log.level.upper())
    return run_tree(
        inject(service.tree(settings), os.path.abspath(directory)),
        tell=lambda line: print(json.dumps(line), flush=True),
        on_reload=lambda: inject(service.tree(load(config)), os.path.abspath(directory)),
        status=service.status,
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
