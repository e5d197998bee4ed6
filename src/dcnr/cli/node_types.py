"""``dcnr network types``: the catalogue, in the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from dcnr.cli.output import JsonOption, command, print_fields, print_json, print_table, say
from dcnr.errors import UsageError

if TYPE_CHECKING:
    from dcnr.network.node_type import Key, NodeType


@command
def types(
    name: Annotated[
        str | None, typer.Argument(metavar="[TYPE]", help="A type or its alias; `common` for the keys of every node.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the whole reference as Markdown.")] = False,
    json: JsonOption = False,
) -> None:
    """What a network may be made of: node types, their config keys, slots, parameters and an example, offline."""
    from dcnr.network.reference import as_data, as_markdown, common_data
    from dcnr.network.types import CATALOGUE, COMMON_KEYS, find_type

    kinds = tuple(CATALOGUE.values())
    if markdown:
        if name is not None or json:
            raise UsageError("--markdown prints all types as Markdown: found it with TYPE or --json, expected it alone")
        say(as_markdown(kinds).rstrip("\n"))
    elif name is None and json:
        print_json({"common_keys": common_data()})
        for kind in kinds:
            print_json(as_data(kind))
    elif name is None:
        print_table(
            ("type", "aliases", "input -> output", "purpose"),
            ((kind.name, " ".join(kind.aliases), kind.shapes, kind.purpose) for kind in kinds),
        )
        say("\nkeys, parameters and an example of one:  dcnr network types TYPE;  keys of every node:  TYPE = common")
    elif name == "common":
        if json:
            print_json({"common_keys": common_data()})
        else:
            _print_keys(COMMON_KEYS)
    else:
        found = find_type(name)
        if isinstance(found, str):
            raise UsageError(found)
        if json:
            print_json(as_data(found))
        else:
            _print_type(found)


def _print_type(kind: NodeType) -> None:
    from dcnr.network import reference

    own, more = reference.parameters(kind)
    facts = {
        "type": kind.name,
        "aliases": ", ".join(kind.aliases),
        "package": kind.package,
        "purpose": kind.purpose,
        "input -> output": kind.shapes,
        "input slots": reference.inputs(kind),
        "parameters": f"{own} (of the example below)" if own else "",
        "further, by config": more,
        "inferred in Python": ", ".join(reference.inferred(kind)),
    }
    print_fields({label: text for label, text in facts.items() if text})
    say("")
    if kind.keys:
        _print_keys(kind.keys)
        say("")
    say(reference.yaml_example(kind))


def _print_keys(keys: Iterable[Key]) -> None:
    from dcnr.network import reference

    print_table(
        ("key", "value", "default", "about"),
        ((key.name, reference.values(key), reference.default(key), key.about) for key in keys),
    )
