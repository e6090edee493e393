"""Carries out a `Confinement`: users, capabilities, limits, Landlock and seccomp.

Strategy: a child gives up its rights in its first lines, in an order in which each step still may
do what it does, and what is given up never comes back.  What this kernel has is found out once, by
asking it; a step that it has and that fails ends the child with a sentence, since one that runs on
with rights that nobody expects is worse than none.
"""

from __future__ import annotations

import ctypes
import functools
import os
import resource
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pkvpn.watchdog import filters
from pkvpn.watchdog.confinement import Confinement, Files, Network
from pkvpn.watchdog.filters import Machine

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# linux/prctl.h
_PR_SET_DUMPABLE, _PR_CAPBSET_READ, _PR_CAPBSET_DROP = 4, 23, 24
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4

# linux/capability.h
CAPABILITIES = {
    "chown": 0, "dac_override": 1, "dac_read_search": 2, "fowner": 3, "kill": 5, "setgid": 6,
    "setuid": 7, "setpcap": 8, "net_bind_service": 10, "net_admin": 12, "ipc_lock": 14,
    "sys_ptrace": 19, "sys_nice": 23, "sys_resource": 24,
}  # fmt: skip
_MOST_CAPABILITIES = 64
_CAPABILITY_VERSION = 0x20080522
_CAP_HEADER = struct.Struct("=Ii")
_CAP_DATA = struct.Struct("=6I")  # effective, permitted, inheritable; the low halves first

# The same numbers on all machines (asm-generic/unistd.h); seccomp's is not.
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_SECCOMP = {"x86_64": 317, "aarch64": 277}

# linux/landlock.h
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_PATH_BENEATH = struct.Struct("=Qi")
_WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
_REMOVE_FILE, _MAKE_REG = 1 << 5, 1 << 8
_READ = _READ_FILE | _READ_DIR
_WRITE = _READ | _WRITE_FILE | _REMOVE_FILE | _MAKE_REG | _TRUNCATE
_OF_FILES = _READ_FILE | _WRITE_FILE | _TRUNCATE
# By version: which rights on files there are, the kinds of network rights, and of scopes (abstract
# unix sockets, signals).
_RIGHTS = (0, 13, 14, 15, 15, 16)
_NETWORK_FROM, _SCOPES_FROM, _SCOPES = 4, 6, 3

# linux/seccomp.h.  The last: the kernel is not to slow the process down against Spectre for having
# a filter, as it did before 5.16; we run no code of others.
_SECCOMP_SET_MODE_FILTER, _SECCOMP_GET_ACTION_AVAIL = 1, 2
_SECCOMP_TRAP = 0x00030000
_SPEC_ALLOW = 1 << 2
_FILTER_PROGRAM = struct.Struct("@HP")


class ConfinementError(OSError):
    """A right that could not be given up; names the step and what the system said."""


class Abilities(NamedTuple):
    """What of it there is here."""

    landlock: int  # its version; 0: none
    seccomp: bool
    root: bool  # so that we can change the user, and look at whom nobody else may


@functools.cache
def abilities() -> Abilities:
    """Ask the kernel, once; to be called in the watchdog."""
    version = _libc.syscall(_LANDLOCK_CREATE, None, 0, _CREATE_RULESET_VERSION)
    seccomp = False
    machine = os.uname().machine
    if machine in filters.MACHINES:
        action = ctypes.c_uint32(_SECCOMP_TRAP)
        asked = (_SECCOMP[machine], _SECCOMP_GET_ACTION_AVAIL, 0, ctypes.byref(action))
        seccomp = _libc.syscall(*asked) == 0
    return Abilities(max(0, version), seccomp, os.geteuid() == 0)


def describe(confinement: Confinement | None, able: Abilities) -> dict[str, str]:
    """What is in force for such a child, and in place of what is not, why it is not."""
    if confinement is None:
        return {}
    user = confinement.user
    kept = "+".join(confinement.capabilities)
    switched_off = "off"
    return {
        "user": user.name if user is not None else _as_the_watchdog(confinement.why_no_user),
        "capabilities": (kept or "none") if able.root else "none",
        "new privileges": "none",
        "dumpable": "no" if able.root else "yes: in User Mode the watchdog could not look either",
        "core dumps": "none" if ("core", 1) in confinement.limits else "as the watchdog",
        "landlock": (
            switched_off
            if confinement.files is None
            else f"version {able.landlock}" if able.landlock else "this kernel has none"
        ),
        "seccomp": (
            switched_off
            if not confinement.calls
            else "on" if able.seccomp else "this kernel or machine has none"
        ),
    }  # fmt: skip


def _as_the_watchdog(why: str) -> str:
    return f"as the watchdog ({why})" if why else "as the watchdog"


# --- in the child ---------------------------------------------------------------------------------


def confine(confinement: Confinement, set_death_signal: Callable[[], None]) -> None:
    """Give up what ``confinement`` does not name.  To be called once, by the only thread.

    ``set_death_signal``: another user has none until it is set anew.  Raises ConfinementError.
    """
    able = abilities()
    for name, value in confinement.limits:
        limit(name, value)
    # While there are rights to open what is named.
    ruleset = -1
    if confinement.files is not None and able.landlock:
        with _step("Landlock"):
            ruleset = _make_ruleset(confinement.files, able.landlock)
    if able.root:
        _become(confinement)
        with _step("not dumpable"):
            _prctl(_PR_SET_DUMPABLE, 0)
        set_death_signal()
    with _step("no new privileges"):
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if ruleset >= 0:
        with _step("Landlock"):
            _checked(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0))
        os.close(ruleset)
    if confinement.calls and able.seccomp:
        machine = filters.MACHINES[os.uname().machine]
        _install(filters.never(machine, os.getpid()), machine)
        if confinement.network is Network.NONE:
            _install(filters.no_network(machine), machine)


def close_network(confinement: Confinement | None) -> None:
    """From here on there are no new sockets, if ``confinement`` says so.

    Raises ConfinementError.
    """
    if confinement is None or confinement.network is not Network.UNTIL_TURN:
        return
    if confinement.calls and abilities().seccomp:
        machine = filters.MACHINES[os.uname().machine]
        _install(filters.no_network(machine), machine)


def limit(name: str, value: int) -> None:
    which = getattr(resource, f"RLIMIT_{name.upper()}")
    with _step(f"limit {name} of {value}"):
        _, hard = resource.getrlimit(which)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(which, (value, value))


def _become(confinement: Confinement) -> None:
    kept = tuple(CAPABILITIES[name] for name in confinement.capabilities)
    with _step("capabilities"):
        _bound(kept)
    if confinement.user is not None:
        with _step(f"user {confinement.user.name}"):
            os.setgroups([])
            os.setresgid(*[confinement.user.gid] * 3)
            os.setresuid(*[confinement.user.uid] * 3)
            kept = ()  # the kernel has taken all
    with _step("capabilities"):
        _keep(kept)


def keep_capabilities(names: tuple[str, ...]) -> None:
    """Give up all others, for this process and all below it, if we have any.

    Raises ConfinementError.
    """
    if not abilities().root:
        return
    kept = tuple(CAPABILITIES[name] for name in names)
    with _step("capabilities"):
        _bound(kept)
        _keep(kept)


def _bound(kept: tuple[int, ...]) -> None:
    """Nothing we might execute gets others either.  Without CAP_SETPCAP it stays as it is."""
    for number in range(_MOST_CAPABILITIES):
        if number in kept:
            continue
        there = _libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0)
        if there < 0:
            return  # the last one that this kernel knows was before
        if there and _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) < 0:
            return
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)


def _keep(kept: tuple[int, ...]) -> None:
    header = _CAP_HEADER.pack(_CAPABILITY_VERSION, 0)
    data = ctypes.create_string_buffer(_CAP_DATA.size)
    _checked(_libc.capget(header, data))
    _, permitted_low, _, _, permitted_high, _ = _CAP_DATA.unpack(data.raw)
    mask = sum(1 << number for number in kept) & (permitted_low | permitted_high << 32)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    _checked(_libc.capset(header, _CAP_DATA.pack(low, low, 0, high, high, 0)))


def _make_ruleset(files: Files, version: int) -> int:
    rights = (1 << _RIGHTS[min(version, len(_RIGHTS) - 1)]) - 1
    attributes = struct.pack("=Q", rights)
    if version >= _NETWORK_FROM:
        attributes += struct.pack("=Q", 0)  # seccomp does it for all kinds of sockets
    if version >= _SCOPES_FROM:
        attributes += struct.pack("=Q", _SCOPES)
    ruleset = _checked(_libc.syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0))
    try:
        for allowed, paths in ((_READ, files.read), (_WRITE, files.write)):
            for path in paths:
                _allow(ruleset, path, allowed & rights)
    except BaseException:
        os.close(ruleset)
        raise
    return ruleset


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _OF_FILES
        rule = _PATH_BENEATH.pack(rights, fd)
        _checked(_libc.syscall(_LANDLOCK_ADD, ruleset, _RULE_PATH_BENEATH, rule, 0))
    finally:
        os.close(fd)


def _install(program: bytes, machine: Machine) -> None:
    code = ctypes.create_string_buffer(program, len(program))
    whole = _FILTER_PROGRAM.pack(len(program) // filters.STEP_SIZE, ctypes.addressof(code))
    number = next(_SECCOMP[name] for name, one in filters.MACHINES.items() if one is machine)
    with _step("seccomp"):
        _checked(_libc.syscall(number, _SECCOMP_SET_MODE_FILTER, _SPEC_ALLOW, whole))


def _prctl(option: int, value: int) -> None:
    _checked(_libc.prctl(option, value, 0, 0, 0))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


@contextmanager
def _step(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfinementError(f"{what}: {why}") from None
