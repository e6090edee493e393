"""The filters, run as the kernel would run them."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from pkvpn.watchdog import filters
from pkvpn.watchdog.filters import MACHINES, NETWORK, NEVER, NUMBERS, Machine, never, no_network

PID = 4711
ALLOW, TRAP, ENOSYS = 0x7FFF0000, 0x00030000, 0x00050000 | 38
KINDS = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)


def ask(program: bytes, machine: Machine, call: int, *arguments: int, audit: int = 0) -> int:
    """What the kernel answers to the call of this number (linux/filter.h, linux/seccomp.h)."""
    data = struct.pack(
        "=IIQ6Q", call, audit or machine.audit, 0, *arguments, *[0] * (6 - len(arguments))
    )
    steps = list(struct.iter_unpack("=HBBI", program))
    at = value = 0
    while True:
        code, yes, no, k = steps[at]
        at += 1
        if code == 0x20:
            (value,) = struct.unpack_from("=I", data, k)
        elif code == 0x06:
            return int(k)
        else:
            at += yes if {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code] else no


def number(machine: Machine, call: str) -> int:
    return NUMBERS[call][machine.column]


@KINDS
def test_what_no_child_needs_ends_it(machine: Machine) -> None:
    program = never(machine, PID)
    answers = {
        call: ask(program, machine, number(machine, call), 1, 2, 3)
        for call in NEVER
        if number(machine, call) >= 0  # there is no fork on the newer kind, only clone
    }
    assert len(answers) > 50
    assert set(answers.values()) == {TRAP}


@KINDS
@pytest.mark.parametrize("call", NETWORK)
def test_who_has_its_sockets_makes_no_others(machine: Machine, call: str) -> None:
    assert ask(no_network(machine), machine, number(machine, call)) == TRAP
    assert ask(never(machine, PID), machine, number(machine, call)) == ALLOW


@KINDS
@pytest.mark.parametrize("call", ["kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"])
def test_signals_go_to_oneself_only(machine: Machine, call: str) -> None:
    program = never(machine, PID)
    assert ask(program, machine, number(machine, call), PID, 11) == ALLOW
    for other in (0, 1, PID + 1, 0xFFFFFFFF):
        assert ask(program, machine, number(machine, call), other, 11) == TRAP


@KINDS
def test_limits_are_ones_own(machine: Machine) -> None:
    program = never(machine, PID)
    assert ask(program, machine, number(machine, "prlimit64"), 0) == ALLOW
    assert ask(program, machine, number(machine, "prlimit64"), PID + 1) == TRAP


@KINDS
def test_there_are_threads_and_no_processes(machine: Machine) -> None:
    program = never(machine, PID)
    threads = 0x003D0F00  # as the C library asks for one
    assert ask(program, machine, number(machine, "clone"), threads) == ALLOW
    assert ask(program, machine, number(machine, "clone"), 0x01200011) == TRAP  # as it forks
    assert ask(program, machine, number(machine, "clone3")) == ENOSYS


@KINDS
@pytest.mark.parametrize(("call", "flags"), [("sendto", 3), ("sendmsg", 2), ("sendmmsg", 3)])
def test_nobody_connects_by_sending(machine: Machine, call: str, flags: int) -> None:
    usual, fast_open = [0] * 6, [0] * 6
    usual[flags], fast_open[flags] = 0x4040, 0x4040 | 0x20000000
    program = no_network(machine)
    assert ask(program, machine, number(machine, call), *usual) == ALLOW
    assert ask(program, machine, number(machine, call), *fast_open) == TRAP
    assert ask(never(machine, PID), machine, number(machine, call), *usual) == ALLOW


@KINDS
def test_there_is_no_way_around_by_another_convention(machine: Machine) -> None:
    for program in (never(machine, PID), no_network(machine)):
        assert ask(program, machine, 0, audit=0x40000003) == TRAP  # 32 bit
        assert ask(program, machine, machine.end) == TRAP  # x32


@KINDS
def test_anything_else_is_allowed(machine: Machine) -> None:
    listed = {numbers[machine.column] for numbers in NUMBERS.values()}
    for program in (never(machine, PID), no_network(machine)):
        for call in set(range(460)) - listed:
            assert ask(program, machine, call, 1, 2, 3, 4, 5, 6) == ALLOW


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        ("aarch64", "/usr/include/asm-generic/unistd.h"),
    ],
)
def test_the_numbers_are_those_of_the_kernel(name: str, header: str) -> None:
    try:
        text = Path(header).read_text(encoding="utf-8")
    except FileNotFoundError:
        pytest.skip(f"{header} is not installed")
    text = text.replace("__NR3264_", "__NR_")
    known = {found[1]: int(found[2]) for found in re.finditer(r"define __NR_(\w+)\s+(\d+)", text)}
    column = MACHINES[name].column
    assert {call: numbers[column] for call, numbers in NUMBERS.items()} == {
        call: known.get(call, -1) for call in NUMBERS
    }


def test_a_program_is_not_longer_than_the_kernel_takes() -> None:
    for machine in MACHINES.values():
        assert len(never(machine, PID)) // filters.STEP_SIZE < 4096
