"""The project's source files as syntax trees, for the tests that look at code."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src"
GENERATED = SRC / "dcnr" / "adapters" / "grpc" / "generated"


def source_files() -> list[Path]:
    """Of the package, without generated code."""
    return sorted(p for p in (SRC / "dcnr").rglob("*.py") if GENERATED not in p.parents)


def test_files() -> list[Path]:
    return sorted((ROOT / "tests").rglob("*.py"))


test_files.__test__ = False  # type: ignore[attr-defined]  # Not a test, whatever pytest thinks of its name.


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import, inside functions too; ``from a import b`` counts as ``a`` and as ``a.b``."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            found += [(node.lineno, node.module)]
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def calls(path: Path) -> list[tuple[int, str, ast.Call]]:
    """(line, dotted name, node) of every call whose function is a plain dotted name."""
    return [
        (node.lineno, ast.unparse(node.func), node)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    ]
