"""Every init system that `install` knows, in the order in which they are looked for.

Strategy: one entry each; what a new one takes is a text in `scripts.py` and an entry here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from pkvpn.service import scripts, units
from pkvpn.service.manager import Command, Manager, ManagerError, call
from pkvpn.service.scripts import LABEL, NAME
from pkvpn.service.units import Plan

# runsvdir looks for new services every 5 s.
_NOTICES_WITHIN = 15.0


def systemd(
    directory: Path = Path("/etc/systemd/system"),
    *,
    user: bool = False,
    sign: Path = Path("/run/systemd/system"),  # sd_booted(3)
) -> Manager:
    service, socket = directory / units.SERVICE, directory / units.SOCKET

    def ask(*words: str) -> Command:
        scope = ("--user",) if user else ()
        return ("systemctl", *scope, "--no-ask-password", *words)

    def files(plan: Plan) -> dict[Path, str]:
        made = {service: units.service_unit(plan)}
        if plan.listen:
            made[socket] = units.socket_unit(plan)
        return made

    def begin(plan: Plan) -> tuple[Command, ...]:
        enable = ask("enable", units.SERVICE, *([units.SOCKET] if plan.listen else []))
        return (ask("daemon-reload"), *(() if plan.manual else (enable,)))

    # A service that listens itself would take the addresses of its socket, and a socket starts its
    # service anew: where there is one it goes first.
    both = ((units.SOCKET,) if socket.exists() else ()) + (units.SERVICE,)
    return Manager(
        name="systemd",
        sign=sign,
        places=(service, socket),
        files=files,
        begin=begin,
        start=(ask("start", units.SERVICE),),
        end=(ask("disable", "--now", *both),),
        forget=(ask("daemon-reload"),),
        verbs={
            "start": ask("start", units.SERVICE),
            "stop": ask("stop", *both),
            "kill": ask("stop", "--no-block", *both),
            "restart": ask("restart", units.SERVICE),
            "reload": ask("reload", units.SERVICE),
        },
        shows=ask("show", "--property=MainPID", "--value", units.SERVICE),
        up=r"^[1-9]",
        journal="`journalctl -u vpnserver`",
    )


def systemd_of_user() -> Manager:
    config = os.environ.get("XDG_CONFIG_HOME", "")
    home = Path(config) if config.startswith("/") else Path.home() / ".config"
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return systemd(home / "systemd/user", user=True, sign=Path(runtime, "systemd"))


def is_restarting(user: bool) -> bool:
    """Whether systemd ends the service to start it anew; False if that is not known."""
    scope = ("--user",) if user else ()
    command = ("systemctl", *scope, "list-jobs", "--no-legend", "--full", units.SERVICE)
    try:
        words = call(command).split()  # JOB UNIT TYPE STATE
    except ManagerError:
        return False
    return len(words) > 2 and words[2] in ("restart", "try-restart")


def _openrc() -> Manager:
    path = Path("/etc/init.d", NAME)
    enabled = Path("/etc/runlevels/default", NAME).is_symlink()
    return Manager(
        name="openrc",
        sign=Path("/run/openrc/softlevel"),
        places=(path,),
        files=lambda plan: {path: scripts.openrc(plan)},
        begin=lambda plan: () if plan.manual else (("rc-update", "add", NAME, "default"),),
        start=(("rc-service", NAME, "start"),),
        end=(
            ("rc-service", NAME, "stop"),
            *([("rc-update", "delete", NAME, "default")] if enabled else []),
        ),
        verbs=_same("rc-service", NAME, start="start", stop="stop", kill="stop"),
        shows=("rc-service", NAME, "status"),
        up="started",
    )


def _s6() -> Manager:
    home = Path("/etc/s6", NAME)
    scanned = Path("/run/service")
    links = [scanned / NAME]
    # What /run/service is made of at the next boot.
    image = Path("/etc/s6-linux-init/current/run-image/service")
    if image.is_dir():
        links.append(image / NAME)
    look = ("s6-svscanctl", "-an", str(scanned))
    return Manager(
        name="s6",
        sign=scanned / ".s6-svscan",
        places=(home / "run", home / "down"),
        files=_directory(home),
        begin=lambda _plan: (*(_link(home, link) for link in links), look),
        start=(("s6-svc", "-u", str(home)),),
        end=(
            ("s6-svc", "-wD", "-d", str(home)),
            *(("rm", "-f", str(link)) for link in links),
            look,
        ),
        forget=(("rm", "-rf", str(home)),),
        verbs=_same("s6-svc", start="-u", stop="-d", kill="-d", last=str(home)),
        shows=("s6-svstat", str(home)),
        up=r"^up ",
        notices_within=_NOTICES_WITHIN,
    )


def _runit() -> Manager:
    home = Path("/etc/sv", NAME)
    # Artix, Void, Debian, the author's own.
    places = ("/run/runit/service", "/var/service", "/etc/service", "/service")
    scanned = next((Path(place) for place in places if Path(place).is_dir()), Path(places[1]))
    link = scanned / NAME
    return Manager(
        name="runit",
        sign=Path("/run/runit"),
        places=(home / "run", home / "down"),
        files=_directory(home),
        begin=lambda _plan: (_link(home, link),),
        start=(("sv", "up", str(home)),),
        # Without its link the supervisor is not started anew, and then it ends with the service.
        end=(("rm", "-f", str(link)), ("sv", "exit", str(home))),
        forget=(("rm", "-rf", str(home)),),
        verbs=_same("sv", start="up", stop="down", kill="down", last=str(home)),
        shows=("sv", "status", str(home)),
        up=r"^run: ",
        notices_within=_NOTICES_WITHIN,
    )


def _launchd() -> Manager:
    path = Path("/Library/LaunchDaemons", f"{LABEL}.plist")
    target = f"system/{LABEL}"
    return Manager(
        name="launchd",
        sign=path.parent,
        places=(path,),
        files=lambda plan: {path: scripts.launchd(plan)},
        begin=lambda _plan: (("launchctl", "load", "-w", str(path)),),
        start=(("launchctl", "kickstart", target),),
        end=(("launchctl", "unload", "-w", str(path)),),
        verbs={
            "start": ("launchctl", "kickstart", target),
            "stop": ("launchctl", "kill", "TERM", target),
            "kill": ("launchctl", "unload", str(path)),
        },
        shows=("launchctl", "print", target),
        up=r"\bpid = ",
    )


def _freebsd() -> Manager:
    path = Path("/usr/local/etc/rc.d", NAME)
    return Manager(
        name="freebsd",
        sign=Path("/etc/rc.subr"),
        places=(path,),
        files=lambda plan: {path: scripts.freebsd(plan)},
        begin=lambda plan: () if plan.manual else (("sysrc", f"{NAME}_enable=YES"),),
        start=(("service", NAME, "onestart"),),
        end=(("service", NAME, "onestop"), ("sysrc", "-ix", f"{NAME}_enable")),
    )


# Debian, Red Hat, and what LSB itself has.
_LSB_TOOLS = {
    "update-rc.d": (("update-rc.d", NAME, "defaults"), ("update-rc.d", "-f", NAME, "remove")),
    "chkconfig": (("chkconfig", "--add", NAME), ("chkconfig", "--del", NAME)),
    "/usr/lib/lsb/install_initd": (
        ("/usr/lib/lsb/install_initd", f"/etc/init.d/{NAME}"),
        ("/usr/lib/lsb/remove_initd", f"/etc/init.d/{NAME}"),
    ),
}


def _lsb() -> Manager:
    path = Path("/etc/init.d", NAME)
    tool = next(filter(shutil.which, _LSB_TOOLS), next(iter(_LSB_TOOLS)))
    enable, disable = _LSB_TOOLS[tool]
    return Manager(
        name="lsb",
        sign=path.parent,
        places=(path,),
        files=lambda plan: {path: scripts.lsb(plan)},
        begin=lambda plan: () if plan.manual else (enable,),
        start=((str(path), "start"),),
        end=((str(path), "stop"), disable),
    )


INITS: Mapping[str, Callable[[], Manager]] = {
    "systemd": systemd,
    "openrc": _openrc,
    "s6": _s6,
    "runit": _runit,
    "launchd": _launchd,
    "freebsd": _freebsd,
    "lsb": _lsb,  # last: the directory is there under most of the others as well
}


def all_inits() -> list[Manager]:
    return [make() for make in INITS.values()]


def managing(runtime_dir: str) -> Manager | None:
    """Whom an operator's verb is to go through: the init system in which this very instance is
    installed for us, if it runs and has to be asked."""
    with contextlib.suppress(OSError, RuntimeError):  # no home
        managers = [systemd_of_user()] if os.geteuid() else all_inits()
        for one in managers:
            if one.verbs and one.instance() == runtime_dir and one.runs():
                return one
    return None


def _directory(home: Path) -> Callable[[Plan], dict[Path, str]]:
    """A service directory of runit or s6; neither starts what has a file `down` beside it."""

    def files(plan: Plan) -> dict[Path, str]:
        return {home / "run": scripts.run(plan), **({home / "down": ""} if plan.manual else {})}

    return files


def _link(home: Path, link: Path) -> Command:
    return ("ln", "-sfn", str(home), str(link))


def _same(*first: str, last: str = "", **words: str) -> dict[str, Command]:
    """One program, and a word for each verb."""
    return {verb: (*first, word, *([last] if last else [])) for verb, word in words.items()}
