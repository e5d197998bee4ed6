"""The catalogue for people: every type with its keys, slots, parameters and an example, made from the entries themselves.

``dcnr network types`` shows it, and ``docs/node-types.md`` is what its option ``--markdown`` prints.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dcnr.network.graph import ConfigValue
from dcnr.network.node_type import Example, Key, NodeType, ParameterSpec, Settings, TensorSpec, compute_dtype
from dcnr.network.types import COMMON_KEYS, normalise_config

INTRODUCTION = """# Node types

What a network may be made of. `dcnr network types` prints this list, `dcnr network types linear` one entry, and both
with the types of packages that are installed on your machine; [own node types](own-node-types.md) says how to make one.

In a network file a node is `{id: .., type: .., config: {..}}`, and edges join its slots; in Python every type is a
method of `dcnr.Graph`, tensors first, then config keys: `g.linear(x, out_dim=5)`. Python infers what follows from the
tensors. Config values may be texts or native values (`"5"` or `5`). Shapes, axes and `target_shape` leave out the batch
axis. An input slot takes exactly one edge, an output slot any number, and slots are numbered from 0. Floating inputs are
cast to what a node computes in; parameters are named as torch names them.
"""

TIES = """## Ties

The node with `shared_weight_alias: NAME` owns a weight, its optimizer and its place. Nodes with
`tie_weight_alias: NAME` use that weight (theirs must have its shape), take no key about training or initial values, and
stay on its PNode. In Python these are `alias=NAME` and `tie=NAME`, and a tied `linear` has no bias unless it is asked
for one.

```yaml
nodes:
  - {id: tokens, type: embedder, config: {vocab_size: 7, dim: 4, seq_len: 6, shared_weight_alias: words}}
  - {id: head, type: linear, config: {in_dim: 4, out_dim: 7, bias: false, tie_weight_alias: words}}
```
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """An example of a type, worked out."""

    config: Settings
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: tuple[ParameterSpec, ...]


def worked_out(kind: NodeType, example: Example) -> Shown:
    settings = normalise_config(kind, example.config, "float32").settings
    dtype = "int64" if example.indexes else compute_dtype(settings)
    inputs = tuple(TensorSpec(shape=shape, dtype=dtype) for shape in example.inputs)
    outputs = kind.shape(settings, inputs)
    return Shown(config=example.config, inputs=inputs, outputs=outputs, parameters=kind.parameters(settings))


def values(key: Key) -> str:
    """What a key may be, bounds included."""
    if key.choices:
        return " | ".join(key.choices)
    names = {"int": "integer", "ints": "list of integers", "float": "number", "bool": "true | false", "str": "text"}
    found = names[key.kind]
    if key.kind == "int" and key.least is not None and key.below is not None:
        found += f", {_plain(key.least)} to {int(key.below) - 1}"
    elif key.least is not None:
        found += f", at least {_plain(key.least)}"
    if key.kind == "float" and key.below is not None:
        found += f", less than {_plain(key.below)}"
    return found + (" or none" if key.none else "")


def default(key: Key) -> str:
    """What a key is when it is not given."""
    if key.derive is not None:
        return key.derived
    if key.default is not None:
        return _plain(key.default)
    return "required" if key.required else "absent"


def inferred(kind: NodeType) -> tuple[str, ...]:
    """Keys that may be left out in Python, in the entry's order."""
    shown = worked_out(kind, kind.examples[0])
    known = set(kind.infer(shown.config, shown.inputs, None))
    return tuple(key.name for key in kind.keys if key.name in known)


def parameters(kind: NodeType) -> tuple[str, str]:
    """The parameters of the first example with their shapes, and what others may have besides."""
    first, *others = (worked_out(kind, example).parameters for example in kind.examples)
    named = [spec.name for spec in first]
    more = [spec.name for specs in others for spec in specs if spec.name not in named]
    return ", ".join(f"{spec.name} {list(spec.shape)}" for spec in first), ", ".join(dict.fromkeys(more))


def inputs(kind: NodeType) -> str:
    return "two or more" if kind.inputs is None else str(kind.inputs)


def yaml_example(kind: NodeType) -> str:
    """The first example as an entry of ``nodes`` in a network file."""
    shown = worked_out(kind, kind.examples[0])
    config = ", ".join(f"{name}: {_plain(value)}" for name, value in shown.config.items())
    return "\n".join(
        (
            f"- id: my_{kind.name}",
            f"  type: {kind.name}",
            *([f"  config: {{{config}}}"] if config else []),
            f"  input_shapes: {[list(spec.shape) for spec in shown.inputs]}",
            f"  output_shapes: {[list(spec.shape) for spec in shown.outputs]}",
        )
    )


def as_data(kind: NodeType) -> dict[str, object]:
    """An entry for programs."""
    first = worked_out(kind, kind.examples[0])
    return {
        "type": kind.name,
        "aliases": list(kind.aliases),
        "package": kind.package,
        "purpose": kind.purpose,
        "shapes": kind.shapes,
        "inputs": kind.inputs,
        "is_cost": kind.is_cost,
        "keys": [_key_data(key) for key in kind.keys],
        "inferred_in_python": list(inferred(kind)),
        "parameters": {spec.name: list(spec.shape) for spec in first.parameters},
        "example": yaml_example(kind),
    }


def common_data() -> list[dict[str, object]]:
    """The keys that every node has, for programs."""
    return [_key_data(key) for key in COMMON_KEYS]


def as_markdown(kinds: Iterable[NodeType]) -> str:
    """The whole reference."""
    listed = tuple(kinds)
    overview = [
        "| type | aliases | input -> output | purpose |",
        "|---|---|---|---|",
        *(
            f"| [`{kind.name}`](#{kind.name}) | {_code(kind.aliases)} | {_cell(kind.shapes)} | {_cell(kind.purpose)} |"
            for kind in listed
        ),
    ]
    parts = [
        INTRODUCTION,
        "\n".join(overview) + "\n",
        "## Keys of every node\n\n" + _keys_markdown(COMMON_KEYS),
        TIES,
        *(_section(kind) for kind in listed),
    ]
    return "\n".join(parts)


def _section(kind: NodeType) -> str:
    own, more = parameters(kind)
    facts = [f"`{kind.shapes}`, {inputs(kind)} input slot{'' if kind.inputs == 1 else 's'}."]
    if kind.aliases:
        facts.append(f"Also called {_code(kind.aliases)}.")
    if kind.package:
        facts.append(f"Of the package {kind.package}.")
    if own or more:
        further = f" Others, by config: {more}." if more else ""
        facts.append(f"Parameters of the example: {own or 'none'}.{further}")
    if inferred(kind):
        facts.append(f"Python infers {_code(inferred(kind))}.")
    keys = f"\n{_keys_markdown(kind.keys)}" if kind.keys else ""
    return f"## {kind.name}\n\n{kind.purpose}\n\n{chr(10).join(facts)}\n{keys}\n```yaml\n{yaml_example(kind)}\n```\n"


def _keys_markdown(keys: Iterable[Key]) -> str:
    rows = (f"| `{key.name}` | {_cell(values(key))} | {_cell(default(key))} | {_cell(key.about)} |" for key in keys)
    return "\n".join(("| key | value | default | about |", "|---|---|---|---|", *rows)) + "\n"


def _key_data(key: Key) -> dict[str, object]:
    return {
        "key": key.name,
        "kind": key.kind,
        "values": values(key),
        "required": key.required,
        "default": default(key),
        "choices": list(key.choices),
        "at_least": key.least,
        "less_than": key.below,
        "about": key.about,
    }


def _cell(text: str) -> str:
    """A bar would end the cell, and a star would begin an emphasis."""
    return text.replace("|", "\\|").replace(" * ", " \\* ")


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _plain(value: ConfigValue) -> str:
    """As a network file has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return str(list(value))
    return f"{value:g}" if isinstance(value, float) else str(value)
