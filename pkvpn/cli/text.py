"""Text for a terminal."""

from collections.abc import Iterator, Sequence


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Write rows of as many cells each as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield printable("  ".join(cells).rstrip())


def printable(text: str) -> str:
    """Replace what would paint the operator's terminal: names come from anybody."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)
