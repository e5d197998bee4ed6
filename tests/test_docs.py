"""The documents name what exists: commands, options, files, links, Python names."""

import ast
import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import dcnr
from dcnr.cli.main import app
from dcnr.client.blocking import Client, Run
from tests.sources import ROOT, SRC, source_files

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
WITH_COMMANDS = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE_OR_FOLDER = re.compile(r"[\w.-]+(/[\w.-]+)*(\.(py|proto|toml|md|yaml|binpb)|/)")
SHELL = ("sh", "bash", "console")


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(path: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(path.read_text()) if language in languages]


def spans(path: Path) -> list[str]:
    """Inline code."""
    return list(SPAN.findall(FENCE.sub("", path.read_text())))


def command_lines(path: Path) -> Iterator[list[str]]:
    """Words of every line of a shell block and of every inline code that begins with a command of ours."""
    lines = [line for body in blocks(path, *SHELL) for line in body.splitlines()]
    for line in (*lines, *spans(path)):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        if words and words[0] in ("dcnr", "make"):
            yield words


def complaints(words: list[str]) -> Iterator[str]:
    """What of a ``dcnr`` line does not exist."""
    command: Any = typer.main.get_command(app)
    options: set[str] = {o for p in command.params for o in p.opts}
    value = False  # Of the option before it.
    for word in words[1:]:
        if value:
            value = False
            continue
        if word in (">", "|"):
            return
        if word.startswith("-"):
            name = word.partition("=")[0]
            if name not in options | {"--help"}:
                yield f"{command.name} has no {name}"
            value = "=" not in word and any(name in p.opts and not p.is_flag for p in command.params)
        elif hasattr(command, "commands"):
            # `a|b|c` names several commands at once; the last one goes on.
            for choice in word.split("|"):
                if choice not in command.commands:
                    yield f"{command.name} has no command {choice}"
            following = command.commands.get(word.split("|")[-1])
            if following is None:
                return
            command = following
            options = {o for p in command.params for o in p.opts}


@each(WITH_COMMANDS)
def test_every_command_and_option_exists(path: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wrong: list[str] = []
    for words in command_lines(path):
        if words[0] == "make":
            wrong += [f"make has no target {word}" for word in words[1:] if word not in targets]
        else:
            wrong += complaints(words)
    assert not wrong


def all_options(command: Any) -> set[str]:
    inner = [option for c in getattr(command, "commands", {}).values() for option in all_options(c)]
    return {*inner, *(option for parameter in command.params for option in parameter.opts)}


@each(DOCUMENTS)
def test_every_option_that_is_named_alone_exists(path: Path) -> None:
    named = {span.split()[0].partition("=")[0] for span in spans(path) if span.startswith("--")}
    assert not named - all_options(typer.main.get_command(app)) - {"--help"}


def test_the_check_sees_what_does_not_exist() -> None:
    assert list(complaints(["dcnr", "train", "x.yaml", "--stepz", "3"])) == ["train has no --stepz"]
    assert list(complaints(["dcnr", "session", "list|shew"])) == ["session has no command shew"]
    assert list(complaints(["dcnr", "trian"])) != []
    assert list(complaints(["dcnr", "nodes", "--network", "there:1"])) == []
    assert list(complaints(["dcnr", "nodes", "--json", "drian"])) == ["nodes has no command drian"]
    assert list(complaints(["dcnr", "network", "template", "gpt", ">", "--file"])) == []


@each(DOCUMENTS)
def test_relative_links_resolve(path: Path) -> None:
    targets = [t.partition("#")[0] for t in LINK.findall(FENCE.sub("", path.read_text())) if "://" not in t]
    missing = [target for target in targets if target and not (path.parent / target).exists()]
    assert not missing


@each(DOCUMENTS)
def test_every_file_that_is_named_exists(path: Path) -> None:
    """Relative to the root or to the package; patterns with placeholders name files of a store, not of ours."""
    named = [span for span in spans(path) if FILE_OR_FOLDER.fullmatch(span)]
    made = {".venv/"}
    bases = (ROOT, SRC / "dcnr")
    missing = [name for name in named if name not in made and not any((base / name).exists() for base in bases)]
    assert not missing


def files_of_the_tree() -> list[str]:
    """Paths in ARCHITECTURE's tree: a folder stands at the margin, its files are indented below it."""
    (tree,) = [body for body in blocks(ARCHITECTURE, "text") if "ids.py" in body]
    found, folder = [], ""
    for line in tree.splitlines():
        name = line.split()[0]
        if name.endswith("/"):
            folder = name
        else:
            found.append(folder + name if line.startswith(" ") else name)
    return found


def test_the_tree_in_architecture_is_the_tree() -> None:
    package = SRC / "dcnr"
    modules = [str(p.relative_to(package)) for p in source_files() if p.name != "__init__.py"]
    assert sorted(files_of_the_tree()) == sorted(modules), "every module has its line in ARCHITECTURE.md, and no other"


@each(WITH_COMMANDS)
def test_python_blocks_use_what_exists(path: Path) -> None:
    keywords: dict[str, Callable[..., Any]] = {
        "train": Client.train,
        "generate": Run.generate,
        "state_dict": Run.state_dict,
        "local": dcnr.local,
    }
    for body in blocks(path, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dcnr":
                assert node.attr in dcnr.__all__
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in keywords:
                known = inspect.signature(keywords[node.func.attr]).parameters
                assert {k.arg for k in node.keywords} <= set(known)


def test_the_graph_of_the_readme_is_a_network() -> None:
    (body,) = [body for body in blocks(ROOT / "README.md", "python") if "dcnr.Graph" in body]
    names: dict[str, Any] = {}
    exec(compile(body.replace("print(g.summary())", "definition = g.definition()"), "README.md", "exec"), names)
    assert names["definition"].costs
