"""The text of the units that systemd is given.

Strategy: everything that differs between machines is a field of `Plan`; the text is made of it and
of nothing else, so that two plans that are equal are the same file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

SERVICE = "vpnserver.service"
SOCKET = "vpnserver.socket"

# At the top of each file of ours: what has it not there is not ours to replace.
MARK = "# Written by `vpnserver install`."
_KINDS = ("#!", "<?xml", "<!--")
# In front of the directory by which a unit is found to be that of an instance.
INSTANCE = "# instance: "
# FileDescriptorName= of the sockets, which is the name they are held under.
LISTEN_NAME = "listen"

# Above the longest pause between two starts of a child that cannot live ([watchdog] backoff_cap),
# so that the tree's own way out comes first.
WATCHDOG_SEC = 20

# systemd's own directories, by what they are in: made by it, with the right modes, at each start,
# and at each other command of the unit.  The core passes through the second to its own.
_DIRECTORIES = {
    "/run/": ("RuntimeDirectory", "0700"),
    "/var/lib/": ("StateDirectory", "0711"),
    "/var/log/": ("LogsDirectory", "0755"),
}

# What the watchdog keeps, and each child gives up again but for what it is there for: ports below
# 1024; TAPs, bridges and large buffers; users for the children, to look at them and to end them;
# files of anybody; priority, OOM scores and limits.
CAPABILITIES = (
    "CAP_NET_BIND_SERVICE", "CAP_NET_ADMIN", "CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_KILL",
    "CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_CHOWN", "CAP_FOWNER",
    "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
)  # fmt: skip

_TEMPORARY = ("/tmp/", "/var/tmp/")  # noqa: S108 - not used, only known

_HARDENING = (
    f"CapabilityBoundingSet={' '.join(CAPABILITIES)}",
    "NoNewPrivileges=yes",
    "ProtectSystem=strict",
    # The program itself may be installed there.
    "ProtectHome=read-only",
    "DevicePolicy=closed",
    "DeviceAllow=/dev/net/tun rw",
    "ProtectClock=yes",
    "ProtectControlGroups=yes",
    "ProtectHostname=yes",
    "ProtectKernelLogs=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelTunables=yes",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "LockPersonality=yes",
    "MemoryDenyWriteExecute=yes",
    "SystemCallArchitectures=native",
    # The second: what the children confine themselves with.
    (
        "SystemCallFilter=@system-service seccomp landlock_create_ruleset landlock_add_rule"
        " landlock_restrict_self"
    ),
    "SystemCallErrorNumber=EPERM",
    "KeyringMode=private",
)


@dataclass(frozen=True)
class Plan:
    """What is to be installed.  Times in seconds."""

    command: tuple[str, ...]  # the program up to the verb
    environment: Mapping[str, str]
    runtime_dir: str
    state_dir: str
    log_dir: str
    listen: tuple[str, ...]  # addresses that systemd is to open; empty: the service does
    descriptors: int  # that systemd keeps for the next process of the service
    start_timeout: float
    stop_timeout: float
    user: bool = False  # a unit of the user's own manager, with that user's rights
    kill_is_final: bool = False
    manual: bool = False  # neither started now nor with the machine


def service_unit(plan: Plan) -> str:
    """The text of the service's unit."""
    return "\n".join(_service_lines(plan)) + "\n"


def socket_unit(plan: Plan) -> str:
    """The text of the unit that listens in its place."""
    return "\n".join(
        (
            *_header(plan),
            "[Unit]",
            "Description=PacketiX VPN Server (addresses)",
            "",
            "[Socket]",
            *(f"ListenStream={address}" for address in plan.listen),
            f"FileDescriptorName={LISTEN_NAME}",
            "Backlog=4096",
            "BindIPv6Only=ipv6-only",
            "",
            "[Install]",
            "WantedBy=sockets.target",
            "",
        )
    )


def is_ours(text: str) -> bool:
    return any(line.startswith(MARK) for line in _top(text)[:1])


def instance_of(text: str) -> str:
    """The runtime directory of the instance that a file of ours runs, or nothing."""
    lines = _top(text) if is_ours(text) else []
    return next((line.removeprefix(INSTANCE) for line in lines if line.startswith(INSTANCE)), "")


def _top(text: str) -> list[str]:
    """The first two lines, behind those that say of what kind a script or an XML file is."""
    lines = itertools.islice(text.splitlines(), 4)
    return list(itertools.dropwhile(lambda line: line.startswith(_KINDS), lines))[:2]


def _header(plan: Plan) -> tuple[str, ...]:
    return (f"{MARK}  Changes belong into a drop-in: systemctl edit vpnserver",
            INSTANCE + plan.runtime_dir, "")  # fmt: skip


def _service_lines(plan: Plan) -> Iterator[str]:
    yield from _header(plan)
    yield "[Unit]"
    yield "Description=PacketiX VPN Server"
    if not plan.user:
        yield "Wants=network-online.target"
        yield "After=network-online.target"
    if plan.listen:
        yield f"Requires={SOCKET}"
        yield f"After={SOCKET}"
    # However often it is killed, it comes back: pauses are made inside the tree.
    yield "StartLimitIntervalSec=0"
    yield ""
    yield "[Service]"
    yield "Type=notify"
    yield "NotifyAccess=main"
    for name, value in sorted(plan.environment.items()):
        yield "Environment=" + _quoted(f"{name}={value}")
    yield "ExecStart=" + _line(*plan.command, "execsvc")
    yield "ExecReload=" + _line(*plan.command, "reload", "--direct")
    # Whether it is to make way for its successor or to end is known to systemd alone.
    yield "ExecStop=" + _line(*plan.command, "execstop", *(["--user"] if plan.user else []))
    yield f"FileDescriptorStoreMax={plan.descriptors}"
    # What systemd says itself from version 254 on.
    yield f"Environment=FDSTORE={plan.descriptors}"
    # It asks the children; what is left after the time-out, and below them, is killed.
    yield "KillMode=mixed"
    yield f"TimeoutStartSec={plan.start_timeout:g}"
    yield f"TimeoutStopSec={plan.stop_timeout:g}"
    yield f"WatchdogSec={WATCHDOG_SEC}"
    yield "Restart=on-failure"
    yield "RestartSec=0"
    if plan.kill_is_final:
        yield "RestartPreventExitStatus=SIGKILL"
    yield from _directories(plan)
    yield "SyslogIdentifier=vpnserver"
    yield "UMask=0077"
    yield "LimitCORE=0"
    yield "TasksMax=infinity"
    yield "OOMPolicy=continue"
    if not plan.user:
        yield "LimitNOFILE=524288"
        yield from _HARDENING
        # A program that is tried out may lie there itself, or what it was told to use.
        paths = (*plan.command, *plan.environment.values(), plan.runtime_dir, plan.state_dir)
        if any(path.startswith(_TEMPORARY) for path in paths):
            yield "ReadWritePaths=" + " ".join(_TEMPORARY)
        else:
            yield "PrivateTmp=yes"
    yield ""
    yield "[Install]"
    yield "WantedBy=" + ("default.target" if plan.user else "multi-user.target")


def _directories(plan: Plan) -> Iterator[str]:
    """Who is in a directory of systemd's own has it made; the others exist and are opened."""
    if plan.user:
        return
    for path in dict.fromkeys((plan.runtime_dir, plan.state_dir, plan.log_dir)):
        for parent, (setting, mode) in _DIRECTORIES.items():
            name = path.removeprefix(parent)
            if name != path and name.replace("-", "").replace("/", "").isalnum():
                yield f"{setting}={name}"
                yield f"{setting}Mode={mode}"
                if setting == "RuntimeDirectory":
                    yield "RuntimeDirectoryPreserve=restart"
                break
        else:
            yield "ReadWritePaths=" + _quoted(path)


def _line(*words: str) -> str:
    return " ".join(map(_quoted, words)).replace("$", "$$")


def _quoted(word: str) -> str:
    """One word of a unit (systemd.syntax(7)); "%" would be a specifier."""
    word = word.replace("%", "%%")
    if word and all(char.isalnum() or char in "-_./=:,@%+" for char in word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
