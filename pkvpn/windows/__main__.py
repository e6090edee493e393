"""The VPN server on Windows from the command line: in the foreground, and what is asked of it.

python -m pkvpn.windows DIRECTORY run [HOST:PORT ...]
python -m pkvpn.windows DIRECTORY status | stop | restart NAME
python -m pkvpn.windows DIRECTORY admin VERB [JSON]      as `hub.add {"name": "office"}`
"""

import json
import os
import sys
from typing import Any

from pkvpn.config import parse_address
from pkvpn.watchdog.control import ControlError
from pkvpn.windows.control import ask

_PORTS = ("0.0.0.0:443", "0.0.0.0:992", "0.0.0.0:8888")


def main(line: list[str]) -> int:
    """Do what the line says and return the exit code."""
    if len(line) < 2:
        _print(__doc__ or "")
        return 2
    directory, verb, *rest = line
    try:
        if verb == "run":
            return _run(directory, rest or list(_PORTS))
        if verb == "admin":
            arguments: dict[str, Any] = json.loads(rest[1]) if len(rest) > 1 else {}
            answer = ask(os.path.join(directory, "admin"), rest[0], arguments)
        else:
            answer = ask(directory, verb, {"name": rest[0]} if rest else {})
    except (ControlError, ValueError, IndexError, OSError) as error:
        sys.stderr.write(f"vpnserver: {error}\n")
        return 1
    _print(json.dumps(answer))
    return 0


def _run(directory: str, addresses: list[str]) -> int:
    # Heavy, and only needed here.
    from pkvpn.windows.server import Service
    from pkvpn.windows.supervisor import run_tree

    service = Service(directory, tuple(map(parse_address, addresses)))
    return run_tree(
        service.tree(), tell=lambda line: _print(json.dumps(line)), status=service.status
    )


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
