"""Names of a process, as ``ps`` and as ``killall`` see it.

Strategy: the *title* (command line) says which process it is, the *name* (comm) is the same
for all of a tree, so that ``killall``, ``pidof`` and ``pgrep -x`` find every one.
``setproctitle`` overwrites both, so the two calls belong together and stand only here.
"""

from __future__ import annotations

import setproctitle


def set_title(title: str, name: str) -> None:
    """Show ``title`` in ``ps``; be found as ``name`` (15 bytes at most).

    To be called in the main thread, first in the watchdog, then first thing in each child.
    """
    setproctitle.setproctitle(title)
    setproctitle.setthreadtitle(name)
