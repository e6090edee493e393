"""What a child is left with when it begins: written down here, carried out in `sandbox`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class User(NamedTuple):
    """Whom a child runs as, with no other groups."""

    name: str
    uid: int
    gid: int


class Files(NamedTuple):
    """Directories and files that may still be opened by name; nothing else may.

    What is not there when the child begins is left out.
    """

    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()  # and read, made, renamed, removed


class Network(Enum):
    """Whether a child makes sockets of its own and connects them."""

    FREE = "free"
    UNTIL_TURN = "until its turn"  # while it prepares; not from `Child.stand_by` on
    NONE = "none"


# A core dump holds keys.  0 would not do: who gets dumps through a pipe is not held by it, and 1 is
# what the kernel knows to mean none at all (core(5), "Piping core dumps to a program").
NO_CORE = ("core", 1)


@dataclass(frozen=True)
class Confinement:
    """The rights of one child.  What the kernel does not have is left out, and `status` says so.

    ``limits``: names as those of `resource`, in small letters, with their values.
    """

    user: User | None = None  # None: the watchdog's own
    why_no_user: str = ""
    capabilities: tuple[str, ...] = ()  # that are kept, if we have any
    limits: tuple[tuple[str, int], ...] = (NO_CORE,)
    files: Files | None = None  # by Landlock; None: what the user may
    calls: bool = False  # by seccomp, see `filters`
    network: Network = Network.FREE  # the same
