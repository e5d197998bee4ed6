"""Where options come from: a flag beats a variable, a variable the file of ``--config``, the file the default.

The parser of the command line does the layering; here are what it lacks: the file itself, complaints about names that
nobody knows, and ``dcnr config show``.

The file is TOML. A table is named as its command is (``[train]``, ``[network.template]``), a key as its option without
the dashes; a key above all tables is for every command that has the option. Values are read as if they were typed, lists
as if they were typed with commas. A variable is ``DCNR_`` with the words of command and option: ``DCNR_TRAIN_BATCH_SIZE``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dcnr.cli.output import JsonOption, command, print_json, print_table, warn
from dcnr.errors import ConfigError, UsageError

PREFIX = "DCNR"
OTHERS = ("DCNR_LIFELINE", "DCNR_TORCH")
"""Variables that are no options: ``dcnr up`` ties its children to its life with the one, ``make`` reads the other."""
ANYWHERE = ("--config", "--debug")
"""Options of ``dcnr`` itself that may also stand behind the command, where people look for them."""

Command = Any
"""The parser's command, group or option: its types belong to a package that is not ours to import."""


class Root(TyperGroup):
    """The top of the command tree."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _hoisted(args))


def _hoisted(arguments: list[str]) -> list[str]:
    """The options of :data:`ANYWHERE` first."""
    first: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word.partition("=")[0] in ANYWHERE:
            first.append(word)
            if word == "--config":
                first += [value for value in (next(words, None),) if value is not None]
        else:
            rest.append(word)
    return first + rest


# --- the tree of commands ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """An option of a command: ``key`` in the file, ``variables`` in the environment, the command's own first."""

    path: tuple[str, ...]
    key: str
    variables: tuple[str, ...]
    parameter: Command


def options(root: Command) -> Iterator[Option]:
    """Every option of every command, those of ``dcnr`` itself with an empty path."""
    stack: list[tuple[tuple[str, ...], Command]] = [((), root)]
    while stack:
        path, node = stack.pop()
        for parameter in node.params:
            flags = [flag for flag in parameter.opts if flag.startswith("--")]
            if not flags or parameter.name in ("help", "version"):
                continue
            given = parameter.envvar
            named = ["_".join((PREFIX, *path, parameter.name)).upper().replace("-", "_")]
            named += [given] if isinstance(given, str) else given or ()
            yield Option(path=path, key=_key(flags[0]), variables=tuple(dict.fromkeys(named)), parameter=parameter)
        stack += [((*path, name), child) for name, child in reversed(getattr(node, "commands", {}).items())]


def _key(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


class Contexts:
    """The parser's context of each command, made without parsing anything: conversions ask for one."""

    def __init__(self, top: Any) -> None:
        self.options = tuple(options(top.command))
        self._known: dict[tuple[str, ...], Any] = {(): top}

    def of(self, path: tuple[str, ...]) -> Any:
        if path not in self._known:
            parent = self.of(path[:-1])
            child = parent.command.commands[path[-1]]
            made = child.context_class(child, parent=parent, info_name=path[-1], **child.context_settings)
            self._known[path] = made
        return self._known[path]


# --- the file ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The file's values, as the parser wants them: nested by command, then by parameter."""

    path: Path
    defaults: dict[str, Any] = field(default_factory=dict)
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)
    """(command, ..., key) to the line; what shares a line with others is not there."""


def read(path: Path, contexts: Contexts) -> Layer:
    """Raises :class:`ConfigError` naming the file and the key, for every key that nobody knows and every wrong value."""
    import tomllib

    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"config file {path} cannot be read: {reason}") from error
    layer = Layer(path=path, lines=_lines(path))
    problems: list[str] = []
    _fill(layer, contexts, problems, document, ())
    if problems:
        raise ConfigError("\n".join(problems))
    return layer


def _fill(
    layer: Layer, contexts: Contexts, problems: list[str], table: Mapping[str, Any], path: tuple[str, ...]
) -> None:
    """Take a table and the tables in it. ``path`` is its command."""
    known = contexts.options
    groups = {option.path[: len(path) + 1] for option in known if len(option.path) > len(path)}
    below = sorted(option[-1] for option in groups if option[:-1] == path)
    for key, value in table.items():
        if isinstance(value, dict) and key in below:
            _fill(layer, contexts, problems, value, (*path, key))
            continue
        wanted = key.replace("-", "_")
        # Above all tables a key is for every command that has the option.
        meant = [o for o in known if o.key == wanted and (o.path == path or not path)]
        # A value of ``dcnr`` itself would take the place of the group's table: ``config``, which no file can name anyway.
        meant = [o for o in meant if o.path or key not in below]
        where = ".".join((*path, key))
        at = f"{layer.path}, line {layer.lines[(*path, key)]}" if (*path, key) in layer.lines else str(layer.path)
        if not meant and key in below:
            problems.append(f"{at}: {where}: found {value!r}, expected a table, [{where}]")
            continue
        if not meant:
            names = sorted({o.key for o in known if o.path == path or not path} | set(below))
            problems.append(f"{at}: unknown key: found {where!r}, expected {_nearest(wanted, names)}")
            continue
        try:
            text = _text(value)
            for option in meant:
                option.parameter.process_value(contexts.of(option.path), text)
        except (ConfigError, typer.BadParameter) as error:
            reason = getattr(error, "message", None) or str(error)
            problems.append(f"{at}: {where}: found {value!r}: {reason}")
            continue
        for option in meant:
            into = layer.defaults
            for word in option.path:
                into = into.setdefault(word, {})
            # What stands in the command's own table beats what stands above all tables.
            if path or option.parameter.name not in into:
                into[option.parameter.name] = text


def _text(value: Any) -> str:
    """As it would be typed. Raises :class:`ConfigError` for what cannot be."""
    if isinstance(value, list):
        return ",".join(_text(item) for item in value)
    if isinstance(value, dict):
        raise ConfigError("found a table, expected a value")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _lines(path: Path) -> dict[tuple[str, ...], int]:
    """Lines of keys that begin one, by table: enough for the form that people write."""
    found: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if header := re.match(r"\s*\[{1,2}\s*([\w.\- ]+?)\s*\]", line):
            table = tuple(part.strip() for part in header[1].split("."))
            found.setdefault(table, number)
        elif key := re.match(r"\s*[\"']?([\w-]+)[\"']?\s*=", line):
            found.setdefault((*table, key[1]), number)
    return found


def _nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    # Only who mistyped pays for loading this.
    from dcnr.network.types import nearest

    return nearest(name, list(known), otherwise)


# --- variables ---------------------------------------------------------------------------------------------


def unknown_variables(root: Command, environment: Mapping[str, str]) -> list[str]:
    """A complaint for every ``DCNR_`` variable that is no option's.

    They are warned of, not refused: a file is ours alone, but an environment is shared with scripts and other versions.
    """
    ours = [name for name in environment if name.startswith(f"{PREFIX}_")]
    if not ours:
        return []
    known = {variable for option in options(root) for variable in option.variables} | set(OTHERS)
    # The common beginning would make any two names alike.
    endings = sorted(name.removeprefix(PREFIX) for name in known)
    complaints = []
    for name in sorted(set(ours) - known):
        meant = _nearest(name.removeprefix(PREFIX), endings, "none")
        expected = meant if meant == "none" else PREFIX + meant.strip("'")
        complaints.append(f"unknown variable: found {name}, expected {expected}")
    return complaints


def apply(context: typer.Context, path: Path | None) -> None:
    """What the top command does before any other runs."""
    root: Command = context.command
    for complaint in unknown_variables(root, os.environ):
        warn(f"warning: {complaint}")
    for option in options(root):
        # The parser would ask the command's own variable last, after the one that all commands share.
        if option.parameter.envvar:
            option.parameter.envvar = list(option.variables)
    if path is not None:
        layer = read(path, Contexts(context))
        context.default_map = layer.defaults
        context.obj = layer


def of_root(context: Any, name: str) -> Any:
    """The value of an option of ``dcnr`` itself: the parser read those before there was a file."""
    (parameter,) = (parameter for parameter in context.command.params if parameter.name == name)
    given = context.lookup_default(name)
    if given is None or context.get_parameter_source(name).name != "DEFAULT":
        return context.params[name]
    return parameter.process_value(context, given)


# --- dcnr config -------------------------------------------------------------------------------------------

app = typer.Typer(help="Where the options of commands come from.", no_args_is_help=True)


@app.command("show", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@command
def show(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[COMMAND] [OPTIONS]", help="Only this command's, as if it were called so."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Every option's value, and where it came from: flag, variable, file, default.

    `dcnr config show train --lr 1e-3` shows what `dcnr train --lr 1e-3` would use.
    """
    top: Any = context.find_root()
    layer: Layer | None = top.obj
    contexts = Contexts(top)
    node, rest = top.command, list(words or ())
    path: tuple[str, ...] = ()
    while rest and not rest[0].startswith("-"):
        children = getattr(node, "commands", {})
        if not children:
            raise UsageError(f"only the options of `dcnr {' '.join(path)}` belong here: leave {rest[0]!r} out")
        if rest[0] not in children:
            raise UsageError(f"unknown command {' '.join((*path, rest[0]))!r}: expected {_nearest(rest[0], children)}")
        path, node = (*path, rest[0]), children[rest.pop(0)]
    if rest and getattr(node, "commands", None):
        raise UsageError(f"options belong to one command, found {' '.join(rest)!r} without one")
    rows = []
    for option in contexts.options:
        if option.path[: len(path)] != path:
            continue
        parent = contexts.of(option.path)
        flags: Mapping[str, Any] = {}
        if option.path == path and rest:
            flags = parent.command.make_parser(parent).parse_args(list(rest))[0]
        elif not option.path:
            flags = {name: value for name, value in top.params.items() if _flagged(top, name)}
        rows.append(_row(option, parent, flags, layer))
    if json:
        for row in rows:
            print_json(row)
        return
    print_table(
        ("command", "option", "value", "from"),
        ((r["command"], r["option"], _cell(r["value"]), r["from"]) for r in rows),
    )


def _flagged(context: Any, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _row(option: Option, context: Any, flags: Mapping[str, Any], layer: Layer | None) -> dict[str, Any]:
    parameter = option.parameter
    value, source = parameter.consume_value(context, flags)
    if value is not None:
        value = parameter.process_value(context, value)
    match source.name:
        case "COMMANDLINE":
            where = "flag"
        case "ENVIRONMENT":
            where = "variable " + next(v for v in option.variables if os.environ.get(v))
        case "DEFAULT_MAP":
            assert layer is not None
            own, shared = (*option.path, option.key), (option.key,)
            line = _line(layer, own) or _line(layer, shared)
            where = f"file {layer.path}" + (f":{line}" if line else "")
        case _:
            where = "default"
    return {
        "command": " ".join(("dcnr", *option.path)),
        "option": parameter.opts[0],
        "value": value if isinstance(value, int | float | str | None) else str(value),
        "from": where,
    }


def _line(layer: Layer, place: tuple[str, ...]) -> int | None:
    spellings = ((*place[:-1], place[-1]), (*place[:-1], place[-1].replace("_", "-")))
    return next((layer.lines[s] for s in spellings if s in layer.lines), None)


def _cell(value: object) -> str:
    return "-" if value is None or value == "" else str(value)
