"""The house lint: what no tool knows about this project."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sources import ROOT, calls, imports, module_name, source_files, test_files, tree

LINES_MOST = 950
BANNED_CALLS = {
    "time.sleep": "machines get time passed in, tests wait for conditions",
    "torch.frombuffer": "its buffers are not aligned, and alignment changes bits: copy into torch.empty",
    "safetensors.torch.load": "its buffers are not aligned, and alignment changes bits: copy into torch.empty",
    "safetensors.torch.load_file": "its buffers are not aligned, and alignment changes bits: copy into torch.empty",
    "torch.load": "it unpickles",
    "torch.save": "it pickles",
    "os.fork": "gRPC and fork do not mix",
}
BANNED_IMPORTS = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "click")
BROAD = {
    "dcnr.runtime.worker": 1,
    "dcnr.runtime.driver": 1,
    "dcnr.adapters.text": 1,
    "dcnr.sim.world": 1,
}
"""Process boundaries: where ``except Exception`` may stand, and how often. Each logs the error with its context."""
PRINTERS = ("dcnr.cli",)
STARTED_BY_NAME = {
    "dcnr": "the package",
    "dcnr.cli.main": "the console script",
}


def everything() -> list[Path]:
    return source_files() + test_files()


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=relative)


@each(everything())
def test_no_banned_call_or_import(path: Path) -> None:
    wrong = [f"line {line}: {name} ({BANNED_CALLS[name]})" for line, name, _ in calls(path) if name in BANNED_CALLS]
    wrong += [f"line {line}: import {name}" for line, name in imports(path) if name.split(".")[0] in BANNED_IMPORTS]
    # `from time import sleep` would hide a call from the list above.
    wrong += [f"line {line}: import {name}" for line, name in imports(path) if name in BANNED_CALLS]
    assert not wrong


@each(test_files())
def test_tests_do_not_sleep(path: Path) -> None:
    wrong = [
        f"line {line}: {ast.unparse(node)}"
        for line, name, node in calls(path)
        if name in ("asyncio.sleep", "sleep") and ast.unparse(node.args[0]) != "0"
    ]
    assert not wrong, "a test waits for what happens, not for time"


@each(source_files())
def test_only_the_command_line_prints(path: Path) -> None:
    if module_name(path).startswith(PRINTERS):
        return
    assert not [f"line {line}" for line, name, _ in calls(path) if name in ("print", "breakpoint", "input")]


@each(source_files())
def test_library_code_leaves_process_and_environment_alone(path: Path) -> None:
    """It never exits, configures logging or reads the environment; the composition root and the command line do."""
    if module_name(path).startswith(("dcnr.cli", "dcnr.app", "dcnr.adapters.telemetry", "dcnr.adapters.torch")):
        return
    banned = ("sys.exit", "exit", "quit", "os._exit", "logging.basicConfig", "structlog.configure", "os.getenv")
    wrong = [f"line {line}: {name}" for line, name, _ in calls(path) if name in banned]
    if module_name(path) != "dcnr.runtime.supervisor":  # It hands its own environment on to its children.
        wrong += [
            f"line {node.lineno}: os.environ"
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "os.environ"
        ]
    assert not wrong


def broad_handlers(path: Path) -> Iterator[int]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) == "Exception"):
            yield node.lineno


@each(source_files())
def test_exception_is_caught_only_at_process_boundaries(path: Path) -> None:
    lines = list(broad_handlers(path))
    assert len(lines) == BROAD.get(module_name(path), 0), f"lines {lines}"


@each(everything())
def test_nothing_is_left_for_later(path: Path) -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "X" + "XX")
    wrong = [n for n, line in enumerate(path.read_text().splitlines(), 1) if any(mark in line for mark in marks)]
    assert not wrong, f"lines {wrong}"


@each(everything())
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= LINES_MOST


def test_no_file_is_dead() -> None:
    """Every module is imported by another one of the package, or named there (what ``python -m`` starts, say)."""
    wanted: set[str] = set(STARTED_BY_NAME)
    for path in source_files():
        me = module_name(path)
        wanted |= {name for _, name in imports(path) if name != me}
        wanted |= {
            node.value
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("dcnr.")
        }
    # A package is there for its modules.
    wanted |= {name.rpartition(".")[0] for name in set(wanted)}
    dead = [relative(p) for p in source_files() if module_name(p) not in wanted]
    assert not dead


@each([p for p in source_files() if p.name != "__init__.py"])
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(tree(path))
