"""The VPN server on Windows from the command line.

vpnserver.exe -m pkvpn.windows VERB [ARGUMENTS]

  /install [--manual] [HOST:PORT ...]   make it a service that starts with the machine, and start it
                                        (--manual: neither); again with other arguments as you like
  /uninstall                            end the service and remove it; its directory stays
  /start, /stop                         the service, and wait until it is done
  /run [HOST:PORT ...]                  in the foreground, with your rights; Ctrl-C ends it
  /status                               how it and its child are, as JSON
  /restart NAME                         a new process of that child
  /admin VERB [JSON]                    as: /admin hub.add {"name": "office"}
  /help                                 this

Addresses: else all of 443, 992 and 8888. Everything that is kept lies in one directory:
%ProgramData%\\pkvpn, or what `--directory DIRECTORY` before the verb says.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from pkvpn.config import ConfigError, parse_address
from pkvpn.watchdog.control import ControlError
from pkvpn.windows import service
from pkvpn.windows.control import ask
from pkvpn.windows.supervisor import Supervisor

_PORTS = ("0.0.0.0:443", "0.0.0.0:992", "0.0.0.0:8888")
_MODULE = "pkvpn.windows"


def main(line: list[str]) -> int:
    """Do what the line says and return the exit code."""
    directory = os.path.join(os.environ.get("PROGRAMDATA", "C:\\ProgramData"), "pkvpn")
    if line[:1] == ["--directory"] and len(line) > 1:
        directory, line = os.path.abspath(line[1]), line[2:]
    if not line or line[0].lower() in {"/help", "/?", "--help"}:
        _print(__doc__ or "")
        return 0 if line else 2
    try:
        return _do(directory, line[0].removeprefix("/").lower(), line[1:])
    except (service.ServiceError, ControlError, ConfigError, OSError) as error:
        return _complain(str(error))
    except (ValueError, IndexError) as error:
        return _complain(f"{' '.join(line)}: {error}")


def _do(directory: str, verb: str, rest: list[str]) -> int:
    if verb == "run":
        return _run(directory, rest, lambda line: _print(json.dumps(line)), lambda _one: None)
    if verb == "execsvc":  # what the system calls
        service.be_service(lambda tell, begun: _run(directory, rest, tell, begun))
        return 0
    if verb == "install":
        return _install(directory, rest)
    if verb in {"uninstall", "start", "stop"} and not rest:
        getattr(service, verb)()
        done = {"uninstall": "Removed", "start": "Started", "stop": "Stopped"}
        _print(f"{service.DISPLAY_NAME} Service {done[verb]}.")
        return 0
    if verb == "admin":
        arguments: dict[str, Any] = json.loads(rest[1]) if len(rest) > 1 else {}
        _print(json.dumps(ask(os.path.join(directory, "admin"), rest[0], arguments)))
        return 0
    if verb in {"status", "restart", "end"}:
        # "end": of the one in the foreground too, which is no service.
        asked = "stop" if verb == "end" else verb
        _print(json.dumps(ask(directory, asked, {"name": rest[0]} if rest else {})))
        return 0
    return _complain(f"there is no verb {verb!r}; /help lists them")


def _install(directory: str, rest: list[str]) -> int:
    manual = "--manual" in rest
    addresses = [word for word in rest if word != "--manual"]
    for address in addresses:
        parse_address(address)
    line = ["-m", _MODULE, "--directory", directory, "/execsvc", *addresses]
    service.install(line, automatic=not manual)
    _print(f"Installed: the service {service.NAME} ({service.DISPLAY_NAME}).")
    if not manual:
        service.start()
        _print(f"{service.DISPLAY_NAME} Service Started.")
    return 0


def _run(
    directory: str,
    addresses: list[str],
    tell: Callable[[dict[str, Any]], None],
    begun: Callable[[Supervisor], None],
) -> int:
    # Heavy, and only needed here.
    from pkvpn.windows.server import Service
    from pkvpn.windows.supervisor import run_tree

    served = Service(directory, tuple(map(parse_address, addresses or _PORTS)))
    return run_tree(served.tree(), tell=tell, status=served.status, begun=begun)


def _complain(text: str) -> int:
    sys.stderr.write(f"vpnserver: {text}\n")
    return 1


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
