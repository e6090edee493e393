"""Records the demo as a picture that moves: docs/demo.svg.

    python -m benchmarks.recording [--seconds N] [--out FILE]

On a machine that does nothing else: its silences are shown as well.

The demo runs in a terminal of its own, and what it wrote there, at the time it wrote it, is what
the picture shows.  Who does not move pictures sees its last frame.
"""

from __future__ import annotations

import argparse
import html
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import ROOT

COLUMNS, ROWS = 100, 40
# The screen is looked at so often: more would not be seen, and makes the file larger.
EVERY = 0.25
# The last frame stands for so long before it begins again.
STANDS = 6.0

_CHARACTER, _LINE, _MARGIN = 8.0, 18, 14
_TOKEN = re.compile(r"\x1b\[(\d*)([A-Za-z])|\r|\n|[^\x1b\r\n]+")


class Row(NamedTuple):
    """One line of the screen; ``style``: the number of the terminal's own code, 0 for plain."""

    text: str = ""
    style: int = 0


class Screen:
    """As much of a terminal as the demo uses: it writes whole lines, and goes up by one."""

    def __init__(self) -> None:
        self.rows = [Row()]
        self._at = 0
        self._column = 0
        self._style = 0
        self._rest = ""

    def feed(self, text: str) -> None:
        text = self._rest + text
        cut = text.rfind("\x1b") if re.search(r"\x1b(\[\d*)?$", text) else len(text)
        self._rest = text[cut:]
        for token in _TOKEN.finditer(text[:cut]):
            if token[0] == "\r":
                self._column = 0
            elif token[0] == "\n":
                self._go(self._at + 1)
            elif token[2] is not None:
                self._control(token[2], int(token[1] or 0))
            else:
                row = self.rows[self._at]
                written = row.text[: self._column].ljust(self._column) + token[0]
                self.rows[self._at] = Row(
                    written + row.text[len(written) :],
                    self._style if token[0].strip() else row.style,
                )
                self._column = len(written)

    def _control(self, letter: str, number: int) -> None:
        row = self.rows[self._at]
        if letter == "m":
            self._style = number
        elif letter == "F":
            self._go(self._at - max(1, number))
            self._column = 0
        elif letter in "KJ":
            self.rows[self._at] = Row(row.text[: self._column], self._style)
            if letter == "J":
                del self.rows[self._at + 1 :]
        else:
            raise ValueError(f"the demo says ESC [ {number} {letter}, which is not known here")

    def _go(self, to: int) -> None:
        self._at = to
        while len(self.rows) <= to:
            self.rows.append(Row())


def record(command: list[str]) -> list[tuple[float, list[Row]]]:
    """What was on the screen and since when, by the seconds since the first word."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(command[0], command)
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    screen, frames = Screen(), list[tuple[float, list[Row]]]()
    began, data = 0.0, b""
    while True:
        try:
            data += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        now = time.monotonic()
        began = began or now
        # What belongs together is written within some microseconds.
        if select.select([terminal], [], [], 0.005)[0]:
            continue
        screen.feed(data.decode())
        data = b""
        if not frames or now - began - frames[-1][0] >= EVERY:
            frames.append((now - began, list(screen.rows)))
    os.close(terminal)
    screen.feed(data.decode())
    frames.append((time.monotonic() - began, list(screen.rows)))
    _, status = os.waitpid(pid, 0)
    if status:
        sys.exit(f"the demo ended with {os.waitstatus_to_exitcode(status)}")
    return frames


def draw(frames: list[tuple[float, list[Row]]], title: str) -> str:
    """The frames as SVG.  Each content of a line is drawn once for each time it was to be seen;
    only what is in the last frame is to be seen without the movement."""
    end = frames[-1][0]
    height = max(len(rows) for _, rows in frames)
    seen: list[tuple[int, Row, float, float]] = []  # line, content, from, until
    open_rows: dict[int, tuple[Row, float]] = {}
    for at, rows in [*frames, (end + STANDS, [])]:
        for line in range(height):
            now = rows[line] if line < len(rows) else Row()
            before, since = open_rows.get(line, (Row(), 0.0))
            if now != before:
                if before.text.strip():
                    seen.append((line, before, since, at))
                open_rows[line] = (now, at)
    width = int(2 * _MARGIN + COLUMNS * _CHARACTER)
    tall = 2 * _MARGIN + height * _LINE
    total = end + STANDS
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tall}" role="img">',
        f"<title>{html.escape(title)}</title>",
        "<style>text{font:13.3px ui-monospace,Menlo,Consolas,monospace;fill:#d6deeb}",
        ".s1{font-weight:bold;fill:#fff}.s33{fill:#ecc48d}</style>",
        f'<rect width="{width}" height="{tall}" rx="8" fill="#10151f">',
        f'<animate id="t" attributeName="rx" values="8;8" dur="{total:.2f}s" begin="0s;t.end"/>',
        "</rect>",
    ]
    for line, row, since, until in seen:
        last = until > end
        kind = f' class="s{row.style}"' if row.style else ""
        hidden = "" if last else ' visibility="hidden"'
        if last:
            moves = (
                f'<set attributeName="visibility" to="hidden" begin="t.begin" dur="{since:.2f}s"/>'
            )
        else:
            moves = (
                f'<set attributeName="visibility" to="visible" begin="t.begin+{since:.2f}s" '
                f'dur="{until - since:.2f}s"/>'
            )
        y = _MARGIN + _LINE * line + 13
        text = html.escape(row.text.rstrip())
        shown = moves if since > 0 or not last else ""
        lines.append(
            f'<text x="{_MARGIN}" y="{y}"{kind}{hidden} xml:space="preserve">{text}{shown}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--seconds", type=float, default=18.0, help="of the demo (18)")
    made.add_argument("--out", type=Path, default=ROOT / "docs" / "demo.svg", help="docs/demo.svg")
    args = made.parse_args()
    words = ["-m", "pkvpn", "demo", "--seconds", f"{args.seconds:g}"]
    frames = record([sys.executable, *words])
    prompt = (0.0, [Row("$ scripts/demo", 1), Row()])
    shifted = [(at + 1.0, [*prompt[1], *rows]) for at, rows in frames]
    picture = draw([prompt, *shifted], "A recording of scripts/demo")
    args.out.write_text(picture, encoding="utf-8")
    print(f"{args.out}: {len(picture) // 1024} KiB, {shifted[-1][0]:.0f} s")


if __name__ == "__main__":
    main()
