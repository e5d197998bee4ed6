"""The reference of node types says what the catalogue says, and its examples are networks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dcnr.adapters.yaml_network import load_network
from dcnr.network.node_type import Key, NodeType
from dcnr.network.reference import TIES, as_markdown, default, values, worked_out, yaml_example
from dcnr.network.types import BUILT_IN, CATALOGUE, COMMON_KEYS

DOCUMENT = Path(__file__).parents[2] / "docs" / "node-types.md"
KEYS = [*COMMON_KEYS, *(key for kind in BUILT_IN for key in kind.keys)]


def test_the_document_is_the_catalogue() -> None:
    assert DOCUMENT.read_text() == as_markdown(BUILT_IN), "dcnr network types --markdown > docs/node-types.md"


@pytest.mark.parametrize("kind", BUILT_IN, ids=lambda kind: kind.name)
def test_every_type_and_key_is_described(kind: NodeType) -> None:
    assert kind.purpose.endswith(".")
    assert "->" in kind.shapes
    assert [key.name for key in kind.keys if not key.about.endswith(".")] == []


def test_every_common_key_is_described_and_every_derived_default_is_said() -> None:
    assert [key.name for key in COMMON_KEYS if not key.about.endswith(".")] == []
    assert [key.name for key in KEYS if (key.derive is not None) != bool(key.derived)] == []


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (Key(name="k", kind="int", least=1, below=9, default=2), ("integer, 1 to 8", "2")),
        (
            Key(name="k", kind="float", least=0.0, below=1.0, required=True),
            ("number, at least 0, less than 1", "required"),
        ),
        (Key(name="k", kind="int", least=1, none=True), ("integer, at least 1 or none", "absent")),
        (Key(name="k", kind="str", choices=("a", "b"), default="a"), ("a | b", "a")),
        (Key(name="k", kind="bool", default=False), ("true | false", "false")),
        (Key(name="k", kind="ints", derive=lambda _: None, derived="`other`"), ("list of integers", "`other`")),
    ],
)
def test_a_key_in_words(key: Key, expected: tuple[str, str]) -> None:
    assert (values(key), default(key)) == expected


def entry(kind: NodeType) -> str:
    """A network file around the example: each input declared, a cost with its target, a tie with its owner."""
    shown = worked_out(kind, kind.examples[0])
    name = f"my_{kind.name}"
    lines = ["inputs:"]
    for slot, spec in enumerate(shown.inputs):
        where = f"name: in{slot}, node_id: {name}, slot_id: {slot}"
        lines.append(f"  - {{{where}, dtype: {spec.dtype}, shape: {list(spec.shape)}}}")
    owner = ""
    if "tie_weight_alias" in shown.config:
        (weight,) = shown.parameters
        rows, columns = weight.shape
        lines.append(f"  - {{name: owner_in, node_id: owner, dtype: float32, shape: [{columns}]}}")
        owner = (
            f"- {{id: owner, type: linear, config: {{in_dim: {columns}, out_dim: {rows}, "
            f"shared_weight_alias: {shown.config['tie_weight_alias']}}}}}\n"
        )
    costs = f"costs:\n  - {{name: c, node_id: {name}, target: y}}\n" if kind.is_cost else ""
    return "name: test\n" + "\n".join(lines) + f"\nnodes:\n{yaml_example(kind)}\n{owner}{costs}"


@pytest.mark.parametrize("kind", BUILT_IN, ids=lambda kind: kind.name)
def test_every_example_is_a_network(kind: NodeType) -> None:
    assert yaml_example(kind) in DOCUMENT.read_text()
    definition = load_network(entry(kind))
    assert definition.nodes[0].type == kind.name


def test_the_example_of_ties_is_a_network() -> None:
    (body,) = re.findall(r"```yaml\n(.*?)```", TIES, re.DOTALL)
    inputs = "inputs:\n  - {name: x, node_id: head, dtype: float32, shape: [6, 4]}\n  - {name: tokens, node_id: tokens, dtype: int64, shape: [6]}\n"
    assert [node.id for node in load_network("name: test\n" + inputs + body).nodes] == ["tokens", "head"]


def test_the_catalogue_is_what_the_document_lists() -> None:
    assert set(CATALOGUE) == {kind.name for kind in BUILT_IN}
