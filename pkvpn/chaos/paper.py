"""What the laboratory found, for people, for programs and as a picture.

Strategy: pure; findings in, text out.  The picture is SVG written by hand, since the product does
not depend on anything that draws.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol


class Found(Protocol):
    """As much of a finding as is shown."""

    id: str
    promise: str
    seen: list[str]
    notice_ms: float | None
    heal_ms: float | None
    refused: int
    lost: int
    sessions_lost: int
    silence_ms: float | None
    violations: list[str]
    skipped: str


_COLUMNS = (
    f"{'fault':28} {'class seen':24} {'notice':>9} {'heal':>9} {'silence':>9} "
    f"{'refused':>7} {'lost':>6} {'sessions':>8}"
)


def heading() -> str:
    """The names of the columns of `line`."""
    return _COLUMNS


def line(found: Found) -> str:
    """One finding as one line; what was not held follows in lines of its own."""
    if found.skipped:
        return f"{_cut(found.id, 28)} skipped: {found.skipped}"
    seen = ", ".join(found.seen) or "-"
    text = (
        f"{_cut(found.id, 28)} {_cut(seen, 24)} {_ms(found.notice_ms)} {_ms(found.heal_ms)} "
        f"{_ms(found.silence_ms)} {found.refused:7} {found.lost:6} {found.sessions_lost:8}"
    )
    return "\n".join([text, *(f"    NOT HELD: {what}" for what in found.violations)])


def _cut(text: str, width: int) -> str:
    return f"{text if len(text) <= width else text[: width - 1] + '…':{width}}"


def _ms(value: float | None) -> str:
    return f"{'-':>9}" if value is None else f"{value:6.{0 if value >= 100 else 1}f} ms"


def summary(findings: Sequence[Found]) -> str:
    """How many faults, and what was not held."""
    made = [found for found in findings if not found.skipped]
    broken = [found for found in made if found.violations]
    faults = sum(found.id.count("+") + 1 for found in made)
    skipped = len(findings) - len(made)
    lost = sum(found.lost for found in made)
    promised = sum(found.lost for found in made if found.promise == "WHOLE")
    lines = [
        f"{faults} faults in {len(made)} rounds" + (f", {skipped} skipped" if skipped else ""),
        f"{lost} frames lost, {promised} of them where none was to be",
        f"{len(broken)} rounds in which something did not hold" if broken else "everything held",
    ]
    return "\n".join(lines)


def as_json(findings: Iterable[Any], **facts: Any) -> dict[str, Any]:
    """What is written to the file: the facts of the run, and every finding whole."""
    return {**facts, "findings": [dataclasses.asdict(found) for found in findings]}


# --- the picture

_ROW, _LEFT, _WIDTH, _TOP = 15, 230, 900, 46
_TICKS = (1.0, 10.0, 100.0, 1000.0, 10000.0)
_SERIES = (
    ("notice_ms", "#d08700", "until the cause is in the journal"),
    ("heal_ms", "#2f7d32", "until all serve again"),
    ("silence_ms", "#1f5fa8", "longest silence between two clients"),
)


def plot(findings: Sequence[Found]) -> str:
    """Each fault a row, its times as dots on a logarithmic scale, as SVG."""
    made = [found for found in findings if not found.skipped]
    height = _TOP + _ROW * len(made) + 30
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}">',
        "<style>text{font:11px sans-serif}.e{text-anchor:end}.m{text-anchor:middle}</style>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for number, (_, colour, meaning) in enumerate(_SERIES):
        x = _LEFT + 215 * number
        lines.append(f'<circle cx="{x}" cy="14" r="4" fill="{colour}"/>')
        lines.append(f'<text x="{x + 9}" y="18">{meaning}</text>')
    bottom = _TOP + _ROW * len(made)
    for tick in _TICKS:
        place = f"{_x(tick):.1f}"
        lines.append(f'<path d="M{place} {_TOP - 8}V{bottom}" stroke="#ddd"/>')
        label = f"{tick:g} ms" if tick < 1000 else f"{tick / 1000:g} s"
        lines.append(f'<text class="m" x="{place}" y="{bottom + 16}">{label}</text>')
    for number, found in enumerate(made):
        y = _TOP + _ROW * number
        weight = ' font-weight="bold" fill="#b00020"' if found.violations else ""
        name = html.escape(_cut(found.id, 34).strip())
        lines.append(f'<text class="e" x="{_LEFT - 8}" y="{y + 4}"{weight}>{name}</text>')
        for field, colour, _ in _SERIES:
            value = getattr(found, field)
            if value is not None:
                lines.append(f'<circle cx="{_x(value):.1f}" cy="{y}" r="3.2" fill="{colour}"/>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _x(value: float) -> float:
    low, high = math.log10(_TICKS[0] / 2), math.log10(_TICKS[-1] * 3)
    part = (math.log10(max(value, _TICKS[0] / 2)) - low) / (high - low)
    return _LEFT + min(1.0, part) * (_WIDTH - _LEFT - 20)
