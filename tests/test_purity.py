"""What decides is plain Python: the pure packages import nothing that could reach a clock, a socket or a tensor.

import-linter holds the layers between our own modules but does not see what comes from outside.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.sources import SRC, imports, module_name, source_files

PURE = (
    "ids",
    "errors",
    "config",
    "machine",
    "protocol",
    "network",
    "session",
    "membership",
    "trust",
    "orchestrator",
    "pnode",
    "serving",
)
ALLOWED = {
    "__future__",
    "abc",
    "bisect",
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "hashlib",
    "heapq",
    "hmac",
    "itertools",
    "json",
    "math",
    "struct",
    "typing",
    "dcnr",
}
EXTRA = {
    "dcnr.orchestrator.placement": {"numpy"},
    # A context manager, and the caller's line for its errors.
    "dcnr.network.builder": {"contextlib", "sys"},
    # "Did you mean ...?" in its errors.
    "dcnr.network.types": {"difflib"},
}
HEAVY = ("torch", "grpc", "asyncio")


def pure_files() -> list[Path]:
    return [p for p in source_files() if p.relative_to(SRC / "dcnr").parts[0].removesuffix(".py") in PURE]


@pytest.mark.parametrize("path", pure_files(), ids=module_name)
def test_a_pure_module_imports_only_what_is_allowed(path: Path) -> None:
    allowed = ALLOWED | EXTRA.get(module_name(path), set())
    wrong = [f"line {line}: {name}" for line, name in imports(path) if name.split(".")[0] not in allowed]
    wrong += [f"line {line}: {name}" for line, name in imports(path) if name.startswith("numpy.random")]
    assert not wrong, f"{path} imports {wrong}"


def loaded_after(statement: str) -> set[str]:
    script = f"import sys\n{statement}\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_the_check_sees_what_is_loaded() -> None:
    assert loaded_after("import asyncio") == {"asyncio"}


@pytest.mark.parametrize("package", sorted({module_name(p).split(".")[1] for p in pure_files()}))
def test_a_pure_package_loads_neither_torch_nor_grpc_nor_asyncio(package: str) -> None:
    modules = [m for m in map(module_name, pure_files()) if m.split(".")[1] == package]
    assert loaded_after("\n".join(f"import {m}" for m in modules)) == set()


def test_importing_dcnr_and_its_graph_loads_no_transport_and_no_torch() -> None:
    assert loaded_after("import dcnr") == set()
    assert loaded_after("import dcnr; dcnr.Graph, dcnr.templates, dcnr.AdamW, dcnr.StepDone") <= {"asyncio"}
    # What `dcnr up` and `dcnr.local` run in the parent, which starts processes and therefore never loads gRPC.
    assert loaded_after("import dcnr.runtime.supervisor") == set()


def test_every_public_name_can_be_loaded() -> None:
    statement = "import dcnr\nfor name in dcnr.__all__: getattr(dcnr, name)"
    assert "torch" in loaded_after(statement), "dcnr.oracle is torch's"
