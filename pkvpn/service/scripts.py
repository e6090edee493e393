"""The files that init systems other than systemd are given.

Strategy: as in `units.py` each text is made of a `Plan` and of nothing else.  What follows the
manual (LSB, FreeBSD) calls `vpnserver start` and has a daemon; what supervises (OpenRC, runit, s6,
launchd) runs the service itself, in its own process, and starts it anew when it ends unasked.
Nothing is ever looked up in the directory that the caller happens to be in.
"""

from __future__ import annotations

import plistlib
import shlex
from collections.abc import Iterable

from pkvpn.service.units import INSTANCE, MARK, Plan

NAME = "vpnserver"
LABEL = "pkvpn.vpnserver"

_WHAT = "PacketiX VPN Server"

# LSB, "Init Script Actions"; `vpnserver` has its exit codes already.
_LSB = """\
### BEGIN INIT INFO
# Provides:          vpnserver
# Required-Start:    $remote_fs $network
# Required-Stop:     $remote_fs $network
# Should-Start:      $named $time $syslog
# Should-Stop:       $named $syslog
# Default-Start:     2 3 4 5
# Default-Stop:      0 1 6
# Short-Description: {what}
# Description:       A VPN server whose process tree heals itself.
### END INIT INFO

PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
{exports}
usage() {{
    echo "usage: $0 start|stop|restart|try-restart|reload|force-reload|status" >&2
    exit 2
}}

[ $# -eq 1 ] || usage
case $1 in
    status) unknown=4 ;;
    start|stop|restart|try-restart|reload|force-reload) unknown=5 ;;
    *) usage ;;
esac
if [ "$1" != status ] && [ "$(id -u)" -ne 0 ]; then
    echo "$0: $1 takes root's rights" >&2
    exit 4
fi
if ! [ -x {program} ]; then
    echo "$0: not installed:" {program} >&2
    exit $unknown
fi
cd / || exit 1
exec {command} "$1"
"""

_OPENRC = """\
description="{what}"
supervisor=supervise-daemon
command={program}
command_args={arguments}
directory=/
respawn_delay=1
respawn_max=0
retry=TERM/{stop:.0f}/KILL/5
extra_started_commands=reload
description_reload="Read the configuration file again"
{exports}
depend() {{
    use localmount net dns logger
    after bootmisc firewall
}}

reload() {{
    ebegin "Reloading $RC_SVCNAME"
    cd / && {command} reload --direct
    eend $?
}}
"""

_RUN = """\
{exports}
exec 2>&1
cd / || exit 1
exec {command} execsvc
"""

_FREEBSD = """\
#
# PROVIDE: vpnserver
# REQUIRE: FILESYSTEMS NETWORKING
# KEYWORD: shutdown

. /etc/rc.subr

name=vpnserver
desc="{what}"
rcvar=vpnserver_enable
extra_commands="reload status"
start_cmd="vpnserver_do start"
stop_cmd="vpnserver_do stop"
restart_cmd="vpnserver_do restart"
reload_cmd="vpnserver_do reload"
status_cmd="vpnserver_do status"
{exports}
vpnserver_do()
{{
    cd / && {command} "$1"
}}

load_rc_config $name
: ${{vpnserver_enable:=NO}}
run_rc_command "$1"
"""


def lsb(plan: Plan) -> str:
    return _script("/bin/sh", _LSB, plan)


def openrc(plan: Plan) -> str:
    return _script("/sbin/openrc-run", _OPENRC, plan)


def run(plan: Plan) -> str:
    """For runit and s6 alike."""
    return _script("/bin/sh", _RUN, plan)


def freebsd(plan: Plan) -> str:
    return _script("/bin/sh", _FREEBSD, plan)


def launchd(plan: Plan) -> str:
    text = plistlib.dumps(
        {
            "Label": LABEL,
            "ProgramArguments": [*plan.command, "execsvc"],
            "EnvironmentVariables": dict(plan.environment),
            "WorkingDirectory": "/",
            "RunAtLoad": not plan.manual,
            # It comes back unless it was asked to end.
            "KeepAlive": False if plan.manual else {"SuccessfulExit": False},
            "ExitTimeOut": int(plan.stop_timeout),
            "Umask": 0o077,
        }
    ).decode()
    declaration, rest = text.split("\n", 1)
    # Two hyphens would end the comment.
    header = "\n".join(_header(plan)).replace("--", "-&#45;")
    return f"{declaration}\n<!--\n{header}\n-->\n{rest}"


def _script(interpreter: str, text: str, plan: Plan) -> str:
    filled = text.format(
        what=_WHAT,
        program=shlex.quote(plan.command[0]),
        command=shlex.join(plan.command),
        # OpenRC reads them as a shell reads a line.
        arguments=shlex.quote(shlex.join((*plan.command[1:], "execsvc"))),
        exports=_exports(plan),
        stop=plan.stop_timeout,
    )
    return "\n".join((f"#!{interpreter}", *_header(plan), filled))


def _header(plan: Plan) -> Iterable[str]:
    return (f"{MARK}  Another run of it overwrites what is changed here.",
            INSTANCE + plan.runtime_dir)  # fmt: skip


def _exports(plan: Plan) -> str:
    return "".join(
        f"{name}={shlex.quote(value)}\nexport {name}\n"
        for name, value in sorted(plan.environment.items())
    )
