"""Who may import whom, and which modules are pure; read from the source, nothing is run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Each part, and what of pkvpn it may import besides itself. A longer name wins over a shorter one.
_CHILD = {"pkvpn.watchdog.child", "pkvpn.watchdog.control", "pkvpn.watchdog.lifeline"}
_EVERYTHING = {"pkvpn"}
ALLOWED: dict[str, set[str]] = {
    "pkvpn": set(),  # __init__ alone
    "pkvpn.__main__": {"pkvpn.cli"},
    "pkvpn.cli": _EVERYTHING,
    "pkvpn.app": _EVERYTHING,
    "pkvpn.chaos": _EVERYTHING,
    "pkvpn.config": set(),
    "pkvpn.logs": set(),
    "pkvpn.listeners": {"pkvpn.config"},
    "pkvpn.service": set(),
    "pkvpn.taps": {"pkvpn.core.accounts", "pkvpn.core.bridge", "pkvpn.watchdog.spec"},
    "pkvpn.keyholder": {
        "pkvpn.edge.certificate",
        "pkvpn.watchdog.confinement",
        "pkvpn.watchdog.sandbox",
        "pkvpn.watchdog.spec",
    },
    "pkvpn.users": {"pkvpn.watchdog.confinement"},
    "pkvpn.watchdog": set(),
    "pkvpn.protocol": set(),
    "pkvpn.channel": {"pkvpn.protocol"},
    "pkvpn.edge": {"pkvpn.channel", "pkvpn.protocol"} | _CHILD,
    "pkvpn.core": {"pkvpn.channel", "pkvpn.protocol"} | _CHILD,
    "pkvpn.client": {"pkvpn.protocol"} | _CHILD,
    "pkvpn.windows": {"pkvpn.watchdog"},
    "pkvpn.windows.__main__": _EVERYTHING,
    "pkvpn.windows.server": _EVERYTHING,
    "pkvpn.windows.edge": {"pkvpn.channel", "pkvpn.core.link", "pkvpn.edge"},
}

# Modules that decide and translate, and leave it to others to act and to wait.
PURE = (
    "pkvpn/protocol/*.py",
    "pkvpn/channel.py",
    "pkvpn/watchdog/spec.py",
    "pkvpn/watchdog/confinement.py",
    "pkvpn/watchdog/filters.py",
    "pkvpn/watchdog/machine.py",
    "pkvpn/watchdog/policy.py",
    "pkvpn/watchdog/verdict.py",
    "pkvpn/watchdog/lifeline.py",
    "pkvpn/watchdog/tree.py",
    "pkvpn/watchdog/witness.py",
    "pkvpn/service/units.py",
    "pkvpn/edge/tls_records.py",
    "pkvpn/edge/flows.py",
    "pkvpn/edge/connection.py",
    "pkvpn/edge/rings.py",
    "pkvpn/edge/checkpoint.py",
    "pkvpn/core/accounts.py",
    "pkvpn/core/hub.py",
    "pkvpn/core/mac_table.py",
    "pkvpn/core/flows.py",
    "pkvpn/core/session.py",
    "pkvpn/core/login.py",
    "pkvpn/core/attempts.py",
    "pkvpn/core/outbox.py",
    "pkvpn/core/certificates.py",
    "pkvpn/core/settings.py",
    "pkvpn/core/blob.py",
    "pkvpn/client/machine.py",
    "pkvpn/chaos/ledger.py",
    "pkvpn/chaos/faults.py",
    "pkvpn/chaos/paper.py",
)

# Clocks, the outside world, chance, and other lines of execution.
IMPURE = {
    "asyncio", "fcntl", "io", "logging", "mmap", "multiprocess", "multiprocessing", "os",
    "pathlib", "psutil", "random", "secrets", "select", "selectors", "shutil", "signal", "socket",
    "sqlite3", "ssl", "subprocess", "sys", "tempfile", "threading", "time",
}  # fmt: skip


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted((ROOT / "pkvpn").rglob("*.py"))}
PURE_MODULES = {module_of(path) for pattern in PURE for path in ROOT.glob(pattern)}


def imports_of(path: Path, *, for_types: bool = True) -> Iterator[str]:
    """Yield every module that is imported anywhere in a file, as deep as it can be told."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not for_types:
        tree = _WithoutTypeChecking().visit(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            module = str(node.module)
            for alias in node.names:
                deeper = f"{module}.{alias.name}"
                yield deeper if deeper in MODULES else module


class _WithoutTypeChecking(ast.NodeTransformer):
    """Drops what only the type checker sees."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node.orelse
        return self.generic_visit(node)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def part_of(module: str) -> str:
    fitting = [
        part for part in ALLOWED if part == module or (part != "pkvpn" and is_within(module, part))
    ]
    assert fitting, f"{module} belongs to no part; say in ALLOWED what it may import"
    return max(fitting, key=len)


@pytest.mark.parametrize("module", MODULES)
def test_a_part_imports_only_what_it_may_know(module: str) -> None:
    part = part_of(module)
    for target in imports_of(MODULES[module]):
        # The package itself has the version and nothing else.
        if not is_within(target, "pkvpn") or target == "pkvpn" or is_within(target, part):
            continue
        assert any(is_within(target, allowed) for allowed in ALLOWED[part]), (
            f"{module} imports {target}"
        )


def test_only_one_verb_of_the_command_line_knows_chaos_and_only_when_it_is_asked() -> None:
    """The product has no back doors: what it is made of cannot even name them."""
    for module, path in MODULES.items():
        if is_within(module, "pkvpn.chaos"):
            continue
        text = path.read_text(encoding="utf-8")
        if module == "pkvpn.cli.laboratory":
            # Inside the verbs' functions: to list the verbs imports nothing of it.
            top = [node for node in ast.parse(text).body if not isinstance(node, ast.FunctionDef)]
            assert "pkvpn.chaos" not in "".join(map(ast.unparse, top))
            continue
        guilty = [name for name in imports_of(path) if is_within(name, "pkvpn.chaos")]
        assert not guilty, f"{module} imports {guilty}"
        # Nor by a name that is put together at run time.
        assert "pkvpn.chaos" not in text, f"{module} names it"


@pytest.mark.parametrize("module", sorted(PURE_MODULES))
def test_a_pure_module_knows_no_world_no_clock_and_no_chance(module: str) -> None:
    for target in imports_of(MODULES[module], for_types=False):
        assert target.split(".")[0] not in IMPURE, f"{module} imports {target}"
        if is_within(target, "pkvpn"):
            assert target in PURE_MODULES, f"{module} is pure and imports {target}, which is not"


def test_every_name_in_the_list_of_pure_modules_finds_one() -> None:
    """A module that was renamed must not fall out of the list unnoticed."""
    for pattern in PURE:
        assert list(ROOT.glob(pattern)), f"{pattern} fits nothing"
