"""Network files: what is read, what is refused and where, and the way back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dcnr.adapters.yaml_network import dump_network, load_analysed, load_network
from dcnr.errors import InvalidNetwork, UsageError
from dcnr.network import templates
from dcnr.network.analysis import analyse
from dcnr.network.graph import MetricSpec, Node, Position, canonical_json, from_canonical_json
from tests.network.graphs import entry, network, node

FILE = """\
name: my-network
precision: float32
nodes:
  - id: embedder
    type: embedder
    config: {vocab_size: "9", dim: "4", seq_len: "6", position_encoding: "none",
             shared_weight_alias: "token_embedding", colocate_group: "embedding",
             colocate_policy: "required", optimizer: "adam"}
    input_shapes: [[6]]
    output_shapes: [[6, 4]]
  - id: on
    type: layernorm
    config: {dim: 4, eps: 1e-5}
  - id: no
    type: dense
    config: {in_dim: 4, out_dim: 9, bias: false, tie_weight_alias: token_embedding}
  - {id: loss, type: cost, config: {cost_function: ce_logits}}
edges:
  - {from: embedder, to: on, from_slot: 0, to_slot: 0}
  - {from: on, to: no}
  - {from: no, to: loss}
outputs:
  - {name: logits, node_id: no, slot_id: 0}
costs:
  - {name: ce_loss, node_id: loss, slot_id: 0, target: targets, weight: 1.0}
metrics:
  - {name: head_learning_rate, type: learning_rate, node_id: on, slot_id: 0}
"""


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(InvalidNetwork) as caught:
        load_network(text)
    return caught.value.problems


def test_a_file_is_analysed_as_its_definition_is():
    """Which is what everybody else has."""
    for file in sorted((Path(__file__).parents[2] / "examples").glob("*.yaml")):
        once, twice = load_analysed(file), analyse(load_network(file))
        assert (once.definition, once.vnodes, once.groups) == (twice.definition, twice.vnodes, twice.groups)


def test_a_file_in_the_contracts_form():
    definition = load_network(FILE)
    assert [node.id for node in definition.nodes] == ["embedder", "on", "no", "loss"]
    assert definition.nodes[0].config["vocab_size"] == 9
    assert definition.nodes[1].config == {"dim": 4}, "1e-5 is a number, and the default"
    assert definition.nodes[2].type == "linear"
    assert definition.nodes[2].at == Position(line=14, column=5)
    assert definition.inputs[0].shape == (6,)
    assert definition.costs[0].target == "targets"


@pytest.mark.parametrize(
    ("written", "precision", "param_precision"),
    [
        ("param_precision: float64\nactivation_precision: float64", "float64", ""),
        ("precision: bf16", "bf16", ""),
        ("precision: bf16\nparam_precision: float32", "bf16", "float32"),
        ("precision: float32\nactivation_precision: bf16", "bf16", "float32"),
        ("activation_precision: bf16\nparam_precision: float32", "bf16", "float32"),
        ("param_precision: bf16", "bf16", ""),
        ("precision: float64\nactivation_precision: bf16\nparam_precision: bf16", "bf16", ""),
    ],
)
def test_precision_has_one_canonical_form(written: str, precision: str, param_precision: str):
    definition = load_network(FILE.replace("precision: float32", written))
    assert (definition.precision, definition.param_precision) == (precision, param_precision)
    assert load_network(dump_network(definition)) == definition
    assert from_canonical_json(canonical_json(definition)) == definition
    assert (b"param_precision" in canonical_json(definition)) == bool(param_precision)


def test_from_a_path(tmp_path: Path):
    (tmp_path / "net.yaml").write_text(FILE)
    assert load_network(tmp_path / "net.yaml") == load_network(FILE)
    with pytest.raises(UsageError, match=r"cannot read network file .*absent"):
        load_network(tmp_path / "absent.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"name: a\nname2: \xff\n")
    with pytest.raises(InvalidNetwork, match=r"bytes\.yaml, line 2, column 8: found bytes that are not UTF-8"):
        load_network(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    "definition",
    [
        load_network(FILE),
        templates.gpt(layers=2, dim=16, heads=2, vocab=32, context=8, dropout=0.25).definition(),
        templates.mlp(3, [5], 2).definition(),
        analyse(
            replace(
                network(
                    node(
                        "1e5", "linear", in_dim=4, out_dim=4, init_std=1e-7, lr_scale=1 / 3, shared_weight_alias="null"
                    ),
                    Node(id="ünï: [x]", type="linear", config={"in_dim": 4, "out_dim": 4, "tie_weight_alias": "null"}),
                    entry("1e5", name="yes"),
                    entry("ünï: [x]", name="12"),
                ),
                metrics=(MetricSpec(name="true", type="learning_rate", node_id="1e5"),),
            )
        ).definition,
    ],
)
def test_round_trip(definition):
    text = dump_network(definition)
    assert load_network(text) == definition
    assert analyse(load_network(text)).id == analyse(definition).id


def test_all_problems_with_their_positions():
    broken = (
        FILE.replace("dim: 4, eps: 1e-5", "dim: [4], epz: 1e-5")
        .replace("type: dense", "type: dence")
        .replace("from_slot: 0", "from_slot: first")
        .replace("{from: no, to: loss}", "{from: no, to: lost, weight: 2}")
        + "extra: 1\nname: again\n"
    )
    assert problems(broken) == (
        "line 13, column 14: node 'on': config key 'dim': found '[4]', expected an integer",
        "line 13, column 24: node 'on': unknown config key: found 'epz', expected 'eps'",
        "line 15, column 5: node 'no': unknown type: found 'dence', expected 'dense', or the package that has it on every peer",
        "line 17, column 5: node 'loss': found input 'loss' without a shape, expected an entry in inputs with shape and dtype",
        "line 19, column 41: edge from 'embedder': from_slot: found 'first', expected an integer",
        "line 21, column 5: node 'lost': found no such node at edge 'no' -> 'lost', expected 'loss'",
        "line 21, column 26: edge from 'no': unknown key: found 'weight', expected one of from, to, from_slot, to_slot",
        "line 28, column 1: network file: unknown key: found 'extra', expected one of name, precision, param_precision, "
        "activation_precision, inputs, nodes, edges, outputs, costs, metrics",
        "line 29, column 1: found key 'name' a second time, expected it once",
    )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("name: my-network", "name: &a my-network", "line 1, column 7: found anchor '&a', expected none"),
        ("precision: float32", "precision: *a", "line 2, column 12: found alias '*a', expected the value itself"),
        ("name: my-network", "name: !!python/name:os.system my-network", "line 1, column 7: found tag 'tag:yaml.org,2002:python/name:os.system'"),
        ("type: layernorm", "type: layernorm\n    type: relu", "line 13, column 5: found key 'type' a second time"),
        ("dim: 4, eps", "dim: 4, dim: 4, eps", "line 13, column 22: found key 'dim' a second time"),
        ("id: on", "id: [on]", "line 11, column 9: node: id: found a list, expected a text"),
        ("    type: layernorm\n", "", "line 11, column 5: node 'on': type: found nothing, expected a text"),
        ("[[6, 4]]", "[[6, four]]", "line 10, column 25: node 'embedder': output_shapes: found 'four', expected an integer"),
        ("[[6, 4]]", "6", "line 10, column 20: node 'embedder': output_shapes: found '6', expected a list of shapes"),
        ("[[6, 4]]", "[[6, 5]]", "line 10, column 5: node 'embedder': output_shapes: found [[6, 5]], expected [[6, 4]]"),
        ("weight: 1.0", "weight: heavy", "line 25, column 73: cost 'ce_loss': weight: found 'heavy', expected a number"),
        ("weight: 1.0", "weight: .inf", "line 25, column 73: cost 'ce_loss': weight: found '.inf', expected a number"),
        ("weight: 1.0", "weight: 1e999", "line 25, column 5: node 'loss': found weight inf at cost 'ce_loss'"),
        ("precision: float32", "precision: half", "precision: found 'half', expected one of float32, float64, bf16"),
        ("precision: float32", "param_precision: half\nactivation_precision: bf16", "param_precision: found 'half', expected one of"),
        ("type: learning_rate", "type: speed", "line 27, column 5: node 'on': found type 'speed' at metric"),
        ("outputs:\n", "outputs: 3\nouts:\n", "line 22, column 10: outputs: found '3', expected a list"),
        ("  - {name: logits,", "  - logits\n  - {name: logits,", "line 23, column 5: outputs: found 'logits', expected a mapping"),
        ("name: my-network", "? [a, b]\n: c\nname: my-network", "line 1, column 3: found a collection as a key, expected a text"),
        ("name: my-network\n", "", "name: found nothing, expected a name"),
    ],
)  # fmt: skip
def test_refusals(old, new, expected):
    assert old in FILE
    assert any(text.startswith(expected) for text in problems(FILE.replace(old, new, 1))), problems(
        FILE.replace(old, new, 1)
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "found no mapping, expected a network file"),
        ("- a", "line 1, column 1: found no mapping, expected a network file"),
        ("just text", "line 1, column 1: found no mapping, expected a network file"),
        ("a: [1,\nb", "line 3, column 1: found malformed YAML"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: found a second document, expected one"),
        ("a: \x00", "line 1, column 4: found malformed YAML"),
        ("[" * 33, "line 1, column 33: found nesting deeper than 32, expected less"),
        ("{a: " * 33, "line 1, column 129: found nesting deeper than 32, expected less"),
        ("a: " + "x" * (4 << 20), "found more than 4194304 bytes"),
    ],
)
def test_not_a_network_file(text, expected):
    (found,) = problems(text)
    assert found.startswith(expected)


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_deep_nesting_ends_early(opening):
    assert any("nesting" in text for text in problems(opening * 100_000))


@pytest.mark.parametrize("key", ["colocate_group", "shared_weight_alias"])
def test_a_list_is_no_text(key: str) -> None:
    text = f"name: x\nnodes:\n- {{id: l, type: linear, config: {{{key}: [a, b]}}}}\n"
    with pytest.raises(InvalidNetwork) as caught:
        load_network(text)
    said = f"line 3, column {36 + len(key)}: node 'l': config key {key!r}: found a list, expected a text"
    assert said in caught.value.problems, caught.value.problems


def test_an_underscore_is_in_no_number() -> None:
    text = FILE.replace("weight: 1.0", "weight: 1_0")
    assert text != FILE
    with pytest.raises(InvalidNetwork, match="weight: found '1_0', expected a number"):
        load_network(text)


@pytest.mark.parametrize("character", ["\x00", "\x01", "\x1b", "\x7f", "\ufffe"])
def test_a_character_that_is_not_allowed_has_its_place(character: str) -> None:
    with pytest.raises(InvalidNetwork) as caught:
        load_network(f"name: x\nnodes:\n- {{id: a{character}, type: relu}}\n")
    said = f"line 3, column 9: found malformed YAML (character {character!r} is not allowed), expected a network file"
    assert caught.value.problems == (said,)
