"""What a process may ask of the kernel, as a seccomp filter: written, not installed.

Strategy: a list of what must never be asked, and not of all that may be: an interpreter and its
libraries ask for hundreds of things, other ones with each release, and who forgets one kills a
healthy process.  What stands here no child of a tree needs, and whoever has taken one over would
begin with: other programs, other processes, other processes' memory, mounts, the kernel itself.

Such a deed is not answered but ends the process with SIGSYS, so that it is seen: its report has
the stack that led there.  The numbers are of the two kinds of machine that we know; on another one
there is no filter.
"""

from __future__ import annotations

import struct
from typing import NamedTuple


class Machine(NamedTuple):
    """What the kernel calls a kind of machine, and which column of the table is its."""

    audit: int  # AUDIT_ARCH_* of linux/audit.h
    column: int
    # Numbers from here on are calls of another convention on the same machine (x32).
    end: int


# By what uname calls them; little endian, 64 bit.
MACHINES = {
    "x86_64": Machine(0xC000003E, 0, 0x40000000),
    "aarch64": Machine(0xC00000B7, 1, 0xFFFFFFFF),
}

# Number of each call on x86_64 and aarch64; -1: there is none.
NUMBERS = {
    "acct": (163, 89), "add_key": (248, 217), "adjtimex": (159, 171),
    "bind": (49, 200), "bpf": (321, 280), "chroot": (161, 51), "clock_adjtime": (305, 266),
    "clock_settime": (227, 112), "clone": (56, 220), "clone3": (435, 435), "connect": (42, 203),
    "delete_module": (176, 106), "execve": (59, 221), "execveat": (322, 281),
    "finit_module": (313, 273), "fork": (57, -1), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fsopen": (430, 430), "fspick": (433, 433), "init_module": (175, 105),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "io_uring_setup": (425, 425),
    "ioperm": (173, -1), "iopl": (172, -1), "ioprio_set": (251, 30), "kcmp": (312, 272),
    "kexec_file_load": (320, 294), "kexec_load": (246, 104), "keyctl": (250, 219),
    "kill": (62, 129), "listen": (50, 201), "migrate_pages": (256, 238), "mknod": (133, -1),
    "mknodat": (259, 33), "modify_ldt": (154, -1), "mount": (165, 40), "mount_setattr": (442, 442),
    "move_mount": (429, 429), "move_pages": (279, 239), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "open_tree": (428, 428), "perf_event_open": (298, 241),
    "personality": (135, 92), "pidfd_getfd": (438, 438), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "pivot_root": (155, 41), "prlimit64": (302, 261),
    "process_madvise": (440, 440), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "ptrace": (101, 117), "quotactl": (179, 60),
    "reboot": (169, 142), "request_key": (249, 218), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "sched_setaffinity": (203, 122), "sched_setattr": (314, 274),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sendmmsg": (307, 269),
    "sendmsg": (46, 211), "sendto": (44, 206), "setdomainname": (171, 162),
    "sethostname": (170, 161), "setns": (308, 268), "setpriority": (141, 140),
    "settimeofday": (164, 170), "socket": (41, 198), "swapoff": (168, 225), "swapon": (167, 224),
    "syslog": (103, 116), "tgkill": (234, 131), "tkill": (200, 130), "umount2": (166, 39),
    "unshare": (272, 97), "userfaultfd": (323, 282), "vfork": (58, -1), "vhangup": (153, 58),
}  # fmt: skip

# Other programs and processes; memory and descriptors of others; what is whose on this machine.
NEVER = (
    "execve", "execveat", "fork", "vfork",
    "ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp",
    "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "tkill",
    "move_pages", "migrate_pages", "setpriority", "ioprio_set",
    "sched_setaffinity", "sched_setattr", "sched_setparam", "sched_setscheduler",
    "mount", "umount2", "pivot_root", "chroot", "setns", "unshare", "open_tree", "move_mount",
    "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr", "mknod", "mknodat",
    "name_to_handle_at", "open_by_handle_at", "quotactl", "swapon", "swapoff", "acct",
    "bpf", "perf_event_open", "userfaultfd", "personality", "modify_ldt", "iopl", "ioperm",
    # What is asked by way of a ring is not seen by a filter.
    "io_uring_setup", "io_uring_enter", "io_uring_register",
    "add_key", "request_key", "keyctl", "init_module", "finit_module", "delete_module",
    "kexec_load", "kexec_file_load", "reboot", "syslog", "vhangup", "settimeofday",
    "clock_settime", "clock_adjtime", "adjtimex", "sethostname", "setdomainname",
)  # fmt: skip

# Whoever has its sockets already makes no other ones, and reaches out to nobody.
NETWORK = ("socket", "connect", "bind", "listen")

# The first argument is the process that it concerns: ours alone (0 is oneself for the last).
_OF_OURSELVES = ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "prlimit64")
# With this flag they connect; which argument has the flags.
_MSG_FASTOPEN = 0x20000000
_SENDING = {"sendto": 3, "sendmsg": 2, "sendmmsg": 3}
_CLONE_THREAD = 0x00010000
_ENOSYS = 38

# linux/seccomp.h
_ALLOW, _TRAP, _ERRNO = 0x7FFF0000, 0x00030000, 0x00050000
# struct seccomp_data: int nr, u32 arch, u64 instruction pointer, u64 args[6]; little endian, so
# the low half of an argument comes first.
_NR, _ARCH, _ARGS = 0, 4, 16

# linux/bpf_common.h; one instruction: u16 code, u8 and u8 how far to jump if true or false, u32 k.
_INSTRUCTION = struct.Struct("=HBBI")
STEP_SIZE = _INSTRUCTION.size
_LOAD, _EQUAL, _NOT_BELOW, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


class _Writer:
    """Writes a program for the number of a call: each step decides, or leaves it to the next."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._program: list[tuple[int, int, int, int]] = []
        self._add(_LOAD, _ARCH)
        self._add(_EQUAL, machine.audit, 1, 0)
        self._add(_RETURN, _TRAP)
        self._add(_LOAD, _NR)
        self._add(_NOT_BELOW, machine.end, 0, 1)
        self._add(_RETURN, _TRAP)

    def answer(self, call: str, action: int) -> None:
        """One answer to this call, whatever its arguments are."""
        number = NUMBERS[call][self._machine.column]
        if number >= 0:
            self._add(_EQUAL, number, 0, 1)
            self._add(_RETURN, action)

    def answer_by(self, call: str, argument: int, test: int, value: int, *, allow: bool) -> None:
        """``test`` the low half of an argument; ``allow`` what passes it, trap the rest, or the
        other way round."""
        number = NUMBERS[call][self._machine.column]
        if number < 0:
            return
        self._add(_EQUAL, number, 0, 4)
        self._add(_LOAD, _ARGS + 8 * argument)
        self._add(test, value, 0, 1)
        self._add(_RETURN, _ALLOW if allow else _TRAP)
        self._add(_RETURN, _TRAP if allow else _ALLOW)

    def program(self) -> bytes:
        self._add(_RETURN, _ALLOW)
        return b"".join(_INSTRUCTION.pack(code, jt, jf, k) for code, jt, jf, k in self._program)

    def _add(self, code: int, k: int, jt: int = 0, jf: int = 0) -> None:
        self._program.append((code, jt, jf, k))


def never(machine: Machine, pid: int) -> bytes:
    """The filter that process ``pid`` lives with from its first line on."""
    writer = _Writer(machine)
    # Looked at with each frame; the others are allowed once and for all by the kernel itself.
    writer.answer("sendto", _ALLOW)
    writer.answer("sendmsg", _ALLOW)
    # Threads are none of the others' business; clone3 hides its flags, and libc falls back.
    writer.answer_by("clone", 0, _ANY_BIT, _CLONE_THREAD, allow=True)
    writer.answer("clone3", _ERRNO | _ENOSYS)
    for call in _OF_OURSELVES[:-1]:
        writer.answer_by(call, 0, _EQUAL, pid, allow=True)
    # All processes but one have a bit of their number set: 0 is oneself.
    writer.answer_by("prlimit64", 0, _ANY_BIT, 0xFFFFFFFF, allow=False)
    for call in NEVER:
        writer.answer(call, _TRAP)
    return writer.program()


def no_network(machine: Machine) -> bytes:
    """The filter on top of it for one that needs no further sockets."""
    writer = _Writer(machine)
    for call, argument in _SENDING.items():
        writer.answer_by(call, argument, _ANY_BIT, _MSG_FASTOPEN, allow=False)
    for call in NETWORK:
        writer.answer(call, _TRAP)
    return writer.program()
