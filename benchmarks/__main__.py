"""Runs benchmarks one after the other and writes their figures into the README.md here and above.

Strategy: each is a process of its own with a limit of time, so one that fails or hangs costs its
own figures only.  README.md shows what the JSON files say and nothing else: the text between two
markers is made from them, and a test compares it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.common import HERE, RESULTS, ROOT, load_result, render

README = HERE / "README.md"
# What shows figures: the page of the benchmarks all, the project's own the most important.
PAGES = (README, ROOT / "README.md")

# Name of the result -> seconds after which it is given up (three times what it takes on two
# processors), and the words that run it.
PROGRAMS = {
    "idle": (1800, ["idle"]),
    "respawn": (3600, ["respawn"]),
    "given": (600, ["given"]),
    "fdstore": (300, ["fdstore"]),
    "services": (1800, ["services"]),
    "hangs": (3600, ["hangs"]),
    "false-kills": (1800, ["false_kills"]),
    "endurance": (3600, ["endurance"]),
    "logins": (1800, ["logins"]),
    "storm": (900, ["storm"]),
    "gaps": (7200, ["gaps"]),
    "gaps-idle": (3600, ["gaps", "--idle", "5000", "--rounds", "20", "--softether", "0"]),
    "reloads": (3600, ["reloads"]),
    "kills": (3600, ["kills"]),
    "throughput": (7200, ["throughput"]),
    "profile": (1800, ["profile"]),
    "abuse": (5400, ["abuse"]),
    "peers": (3600, ["peers"]),
}
_BLOCK = re.compile(
    r"(<!-- figures: (?P<name>[a-z-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL
)


def with_figures(text: str, results: Path = RESULTS, plots: str = "results") -> str:
    """The text with what stands between its markers made anew; ``plots``: where it links to."""

    def block(found: re.Match[str]) -> str:
        result = load_result(found["name"], results)
        if result is None:
            body = "Not measured yet.\n"
        else:
            body = f"{render(result)}\n"
            if (results / f"{found['name']}.png").exists():
                body += f"\n![{found['name']}]({plots}/{found['name']}.png)\n"
        return f"{found[1]}\n{body}\n{found[3]}"

    return _BLOCK.sub(block, text)


def as_measured(page: Path) -> str:
    """The page with its figures made anew."""
    plots = RESULTS.relative_to(page.parent).as_posix()
    return with_figures(page.read_text(encoding="utf-8"), plots=plots)


def main() -> int:
    words = sys.argv[1:]
    passed: list[str] = []
    if "--" in words:
        at = words.index("--")
        words, passed = words[:at], words[at + 1 :]
    made = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    made.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PROGRAMS))
    made.add_argument("--quick", action="store_true", help="only see whether they work")
    made.add_argument("--readme", action="store_true", help="only write the figures")
    args = made.parse_args(words)
    if unknown := set(args.names) - set(PROGRAMS):
        made.error(f"there is no benchmark {', '.join(sorted(unknown))}")
    failed = [] if args.readme else run(args.names or list(PROGRAMS), passed, quick=args.quick)
    if not args.quick:
        for page in PAGES:
            page.write_text(as_measured(page), encoding="utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def run(names: list[str], passed: list[str], *, quick: bool) -> list[str]:
    """Run them; the names of those that failed."""
    failed = []
    for name in names:
        print(f"=== {name}", flush=True)
        limit, (module, *words) = PROGRAMS[name]
        command = [sys.executable, "-m", f"benchmarks.{module}", *words]
        command += [*["--quick"] * quick, *passed]
        try:
            if subprocess.run(command, cwd=ROOT, check=False, timeout=limit).returncode:
                failed.append(name)
        except subprocess.TimeoutExpired:
            print(f"{name}: not done after {limit} s", file=sys.stderr)
            failed.append(name)
    return failed


if __name__ == "__main__":
    sys.exit(main())
