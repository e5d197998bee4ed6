"""Every type of the catalogue: shapes, parameters, config values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dcnr.ids import VNodeId
from dcnr.network.analysis import TensorSpec, analyse
from dcnr.network.graph import ConfigValue, Node
from dcnr.network.types import CATALOGUE, catalogue_digest, find_type, normalise_config
from tests.network.graphs import cost, edge, entry, network, node, problems


def one(kind: str, shape: tuple[int, ...], dtype: str = "float32", **config: ConfigValue):
    """The analysed single node of a network."""
    extra = (cost("n"),) if kind == "cost" else ()
    return analyse(network(node("n", kind, **config), entry("n", shape, dtype), *extra)).vnodes["n"]


@pytest.mark.parametrize(
    ("kind", "config", "shape", "expected", "parameters"),
    [
        ("linear", {"in_dim": 4, "out_dim": 3}, (7, 4), (7, 3), {"weight": (3, 4), "bias": (3,)}),
        ("dense", {"in_dim": "4", "out_dim": "3", "bias": "false"}, (4,), (3,), {"weight": (3, 4)}),
        ("layernorm", {"dim": 4}, (7, 4), (7, 4), {"weight": (4,), "bias": (4,)}),
        ("layernorm", {"dim": 4, "bias": False}, (4,), (4,), {"weight": (4,)}),
        ("gelu", {"approximate": "tanh"}, (7, 4), (7, 4), {}),
        ("relu", {}, (4,), (4,), {}),
        ("dropout", {"rate": "1e-1"}, (4,), (4,), {}),
        ("cost", {"cost_function": "mse"}, (7, 4), (), {}),
        ("cost", {"cost_function": "ce_logits", "vocab_size": 4}, (7, 4), (), {}),
        (
            "attention",
            {"num_heads": 4, "dim": 16, "num_kv_heads": 2},
            (7, 16),
            (7, 16),
            {"q.weight": (16, 16), "k.weight": (8, 16), "v.weight": (8, 16), "o.weight": (16, 16), "o.bias": (16,)},
        ),
        (
            "multiheadattention",
            {"num_heads": 2, "head_dim": 4, "dim": 6, "input_dim": 10, "qkv_bias": True, "out_bias": False},
            (5, 10),
            (5, 6),
            {
                "q.weight": (8, 10),
                "q.bias": (8,),
                "k.weight": (8, 10),
                "k.bias": (8,),
                "v.weight": (8, 10),
                "v.bias": (8,),
                "o.weight": (6, 8),
            },
        ),
        (
            "attention",
            {"num_heads": 2, "dim": 8, "output_projection": False},
            (5, 8),
            (5, 8),
            {"q.weight": (8, 8), "k.weight": (8, 8), "v.weight": (8, 8)},
        ),
    ],
)
def test_shapes_and_parameters(kind, config, shape, expected, parameters):
    info = one(kind, shape, **config)
    assert [spec.shape for spec in info.outputs] == [expected]
    assert {p.name: p.shape for p in info.parameters} == parameters


def test_embedder_positions():
    config = {"vocab_size": 9, "dim": 4, "seq_len": 6}
    learned = one("embedder", (5,), "int64", **config)
    assert [(p.name, p.shape) for p in learned.parameters] == [("weight", (9, 4)), ("position.weight", (6, 4))]
    assert learned.outputs == (TensorSpec(shape=(5, 4), dtype="float32"),)
    for encoding in ("rope", "none"):
        plain = one("embedder", (5,), "int64", position_encoding=encoding, **config)
        assert [p.name for p in plain.parameters] == ["weight"]


def test_broadcast_and_add():
    analysed = analyse(
        network(
            node("b", "broadcast", num_outputs="3"),
            node("a", "add"),
            entry("b"),
            edge("b", "a", 0, 0),
            edge("b", "a", 2, 1),
            edge("b", "a", 2, 2),
        )
    )
    assert len(analysed.vnodes["b"].outputs) == 3
    assert analysed.vnodes["b"].out_edges == ((0,), (), (1, 2))
    assert analysed.vnodes["a"].in_edges == (0, 1, 2)
    assert analysed.vnodes["a"].outputs == (TensorSpec(shape=(4,), dtype="float32"),)


def test_precision_reaches_parameters_and_tensors():
    info = analyse(network(node("n", "linear", in_dim=4, out_dim=3), entry("n"), precision="float64")).vnodes["n"]
    assert {p.dtype for p in info.parameters} == {"float64"}
    assert info.outputs[0].dtype == "float64"
    assert info.parameter_bytes == 8 * (12 + 3)


def test_a_node_casts_what_arrives_to_its_own_precision():
    nodes = (
        node("a", "linear", in_dim=4, out_dim=4),
        node("b", "linear", in_dim=4, out_dim=4, precision="float32"),
        node("c", "linear", in_dim=4, out_dim=4, param_precision="float32"),
        node("loss", "cost", cost_function="mse"),
    )
    found = analyse(
        network(
            *nodes,
            edge("a", "b"),
            edge("b", "c"),
            edge("c", "loss"),
            entry("a", shape=(4,)),
            cost("loss"),
            precision="bf16",
        )
    )
    dtypes = {vnode: (info.inputs[0].dtype, info.outputs[0].dtype) for vnode, info in found.vnodes.items()}
    # Data enter in a dtype that numpy has; a cost is computed, and its value given, in float32.
    assert dtypes == {
        "a": ("float32", "bfloat16"),
        "b": ("bfloat16", "float32"),
        "c": ("float32", "bfloat16"),
        "loss": ("bfloat16", "float32"),
    }
    assert [found.vnodes[VNodeId(v)].parameter_bytes for v in "abc"] == [2 * 20, 4 * 20, 4 * 20]
    assert [target.dtype for target in found.cost_targets()] == ["float32"]
    assert found.gradient_edges == {0, 1, 2}
    # What a node gives and, where it is cast, a copy of what it takes.
    assert [found.vnodes[VNodeId(v)].activation_bytes_per_row for v in "abc"] == [8 + 8, 16 + 16, 8 + 8]
    configs = {n.id: dict(n.config) for n in found.definition.nodes}
    assert configs["b"] == {
        "in_dim": 4, "out_dim": 4, "activation_precision": "float32", "param_precision": "float32"
    }  # fmt: skip
    assert configs["c"] == {"in_dim": 4, "out_dim": 4, "param_precision": "float32"}


def test_initialisation():
    info = one("attention", (5, 8), num_heads=2, dim=8, init_std="0.5", output_init_std=0.25)
    assert {p.name: (p.init, p.std) for p in info.parameters} == {
        "q.weight": ("normal", 0.5),
        "k.weight": ("normal", 0.5),
        "v.weight": ("normal", 0.5),
        "o.weight": ("normal", 0.25),
        "o.bias": ("zeros", 0.0),
    }
    gains = one("layernorm", (4,), dim=4).parameters
    assert [p.init for p in gains] == ["ones", "zeros"]
    assert one("linear", (4,), in_dim=4, out_dim=4).parameters[0].std == 0.02


def test_config_is_canonical():
    """Text and native values, defaults given and left out, aliases and first names: one definition, one id."""
    plain = network(node("n", "attention", num_heads=2, dim=8), entry("n", (5, 8)))
    wordy = network(
        node("n", "multiheadattention", num_heads="2", dim="8", head_dim="4", input_dim=8, num_kv_heads=2, causal="true",
             rope_theta="1e4", bias=None, precision="float32", window="none", qk_norm="none", rope_scaling="none",
             lr_scale="1", trainable="True"),
        entry("n", (5, 8)),
    )  # fmt: skip
    assert problems(wordy) == ("node 'n': unknown config key: found 'bias', expected 'qkv_bias'",)
    config = {key: value for key, value in wordy.nodes[0].config.items() if key != "bias"}
    wordy = network(Node(id=wordy.nodes[0].id, type="multiheadattention", config=config), entry("n", (5, 8)))
    assert analyse(plain).id == analyse(wordy).id
    assert analyse(plain).definition.nodes[0].config == {"num_heads": 2, "dim": 8}
    assert analyse(plain).vnodes["n"].settings["head_dim"] == 4


@pytest.mark.parametrize(
    ("kind", "shape", "config", "expected"),
    [
        ("linear", (4,), {"in_dim": 5, "out_dim": 3}, "found input [4] float32, expected [.., 5] (in_dim)"),
        ("linear", (4,), {"in_dim": 4}, "config key 'out_dim': found nothing, expected an integer"),
        ("linear", (4,), {"in_dim": "4.5", "out_dim": 3}, "config key 'in_dim': found '4.5', expected an integer"),
        ("linear", (4,), {"in_dim": True, "out_dim": 3}, "config key 'in_dim': found True, expected an integer"),
        ("linear", (4,), {"in_dim": 0, "out_dim": 3}, "config key 'in_dim': found 0, expected at least 1"),
        ("linear", (4,), {"in_dim": 4, "out_dim": 3, "bias": "yes"}, "config key 'bias': found 'yes', expected true or false"),
        ("linear", (4,), {"in_dim": 4, "out_dim": 3, "biass": 1}, "unknown config key: found 'biass', expected 'bias'"),
        ("linear", (4,), {"in_dim": 4, "out_dim": 3, "optimizer": "lion"}, "config key 'optimizer': found 'lion', expected one of adam"),
        ("layernorm", (4,), {"dim": 4, "eps": "nan"}, "config key 'eps': found 'nan', expected a finite number"),
        ("dropout", (4,), {"rate": 1}, "config key 'rate': found 1, expected less than 1"),
        ("relu", (4,), {"colocate_policy": "required"}, "found it without colocate_group"),
        ("relu", (4,), {"precision": "half"}, "found 'half', expected one of float32, float64, bf16"),
        ("cost", (4,), {"cost_function": "mse", "cost_precision": "bf16"}, "found 'bf16', expected one of float32, float64"),
        ("attention", (5, 8), {"num_heads": 2, "dim": 8, "window": 0}, "config key 'window': found 0, expected at least 1"),
        ("attention", (5, 8), {"num_heads": 2, "dim": 8, "window": "wide"}, "config key 'window': found 'wide', expected an integer or none"),
        ("attention", (5, 8), {"num_heads": 2, "dim": 8, "rope_scaling": 2, "position_encoding": "none"}, "found it without position_encoding rope"),
        ("attention_head", (5, 8), {"input_dim": 8, "head_dim": 3}, "found 3, expected an even number with position_encoding rope"),
        ("swiglu", (7,), {}, "found input [7] float32, expected [.., 2 n]"),
        ("mask", (4, 4), {"mask_val": -1e39}, "config key 'mask_val': found -1e+39, expected at most 3.40282e+38 away from 0"),
        ("mask", (4, 5), {}, "found input [4, 5] float32, expected [.., T, T]"),
        ("reshape", (4,), {"target_shape": [3, -1]}, "expected 3 elements or, with -1, a multiple (target_shape)"),
        ("reshape", (4,), {"target_shape": [-1, -1]}, "found [-1, -1], expected sizes of at least 1 and at most one -1"),
        ("reshape", (4,), {"target_shape": "[2, two]"}, "expected one to 8 integers, as in [2, -1]"),
        ("transpose", (4, 5), {"axes": [0, 0]}, "expected one whose axes are each named once by axes [0, 0]"),
        ("transpose", (4, 5), {"axes": [0, 2]}, "expected one with axis 2 (the batch axis is not counted)"),
        ("slice", (4, 5), {"axis": 0, "start": 3, "stop": 2}, "expected axis 0 to hold 3..2 (start, stop)"),
        ("slice", (4, 5), {"stop": 6}, "expected axis 1 to hold 0..6 (start, stop)"),
        ("scale", (4,), {}, "config key 'factor': found nothing, expected a number"),
        ("attention", (5, 8), {"num_heads": 3, "dim": 8}, "config key 'head_dim': found nothing"),
        ("attention", (5, 8), {"num_heads": 2, "dim": 8, "num_kv_heads": 3}, "expected a divisor of num_heads 2"),
        ("attention", (5, 6), {"num_heads": 2, "dim": 6}, "expected an even number with position_encoding rope"),
        ("attention", (5, 8), {"num_heads": 2, "dim": 8, "seq_len": 4}, "expected [T, 8] with T <= 4 (seq_len)"),
        ("attention", (8,), {"num_heads": 2, "dim": 8}, "expected [T, 8]"),
        ("cost", (4,), {"cost_function": "mae"}, "config key 'cost_function': found 'mae', expected one of mse, ce, ce_logits"),
        ("cost", (4,), {"cost_function": "mse", "label_smoothing": "0.1"}, "found it with cost_function mse, expected ce or ce_logits"),
        ("cost", (4,), {"cost_function": "ce", "z_loss": "0.1"}, "found it with cost_function ce, expected ce_logits"),
        ("cost", (4,), {"cost_function": "ce", "ignore_index": 2**63}, f"found {2**63}, expected less than {2**63}"),
        ("cost", (4,), {"cost_function": "ce", "ignore_index": -(2**63) - 1}, f"expected at least {-(2**63)}"),
        ("tied_lm_head_ce", (4, 8), {"in_dim": 8, "out_dim": 9}, "expected the alias of the head's weight"),
        ("cost", (4,), {"cost_function": "ce_logits", "vocab_size": 5}, "expected [.., 5] (vocab_size)"),
        ("embedder", (4,), {"vocab_size": 9, "dim": 4, "seq_len": 4}, "found input [4] float32, expected dtype int64"),
        ("embedder", (4,), {"vocab_size": 9, "dim": 4}, "expected it with position_encoding learned"),
        ("rmsnorm", (4,), {}, "config key 'dim': found nothing, expected an integer"),
        ("liner", (4,), {}, "unknown type: found 'liner', expected 'linear', or the package that has it on every peer"),
        ("tokenizer", (4,), {}, "tokenizers belong to datasets: dcnr data add --tokenizer"),
    ],
)  # fmt: skip
def test_refusals(kind, shape, config, expected):
    extra = (cost("n"),) if kind in ("cost", "tied_lm_head_ce") else ()
    (found,) = problems(network(node("n", kind, **config), entry("n", shape, "float32"), *extra))
    assert found.startswith("node 'n': ")
    assert expected in found


def test_none_stands_for_an_absent_value():
    plain = one("attention", (5, 8), num_heads=2, dim=8)
    for text in ("none", None):
        assert one("attention", (5, 8), num_heads=2, dim=8, window=text, rope_scaling=text, qk_norm=text) == plain
    assert plain.settings["window"] is None


@pytest.mark.parametrize(
    ("kind", "config", "shape", "expected"),
    [
        ("swiglu", {}, (3, 8), (3, 4)),
        ("attention_head", {"input_dim": 8, "head_dim": "4"}, (5, 8), (5, 4)),
        ("singleheadattention", {"input_dim": 8, "head_dim": 2}, (5, 8), (5, 2)),
        ("reshape", {"target_shape": "2,-1"}, (4, 6), (2, 12)),
        ("reshape", {"target_shape": [24]}, (4, 6), (24,)),
        ("transpose", {"axes": "[2, 0, 1]"}, (4, 5, 6), (6, 4, 5)),
        ("slice", {"start": -2}, (4, 6), (4, 2)),
        ("slice", {"axis": 0, "start": 1, "stop": "-1"}, (4, 6), (2, 6)),
        ("flatten", {}, (4, 5, 6), (120,)),
        ("mask", {}, (2, 4, 4), (2, 4, 4)),
        ("scale", {"factor": "1e-1"}, (4,), (4,)),
        ("rmsnorm", {"dim": 4}, (7, 4), (7, 4)),
    ],
)
def test_shapes_of_one_input(kind, config, shape, expected):
    assert [spec.shape for spec in one(kind, shape, **config).outputs] == [expected]


@pytest.mark.parametrize(
    ("kind", "config", "shapes", "expected"),
    [
        ("stack", {}, [(3, 4), (3, 1)], (3, 5)),
        ("concat", {"axis": 0}, [(3, 4), (1, 4), (2, 4)], (6, 4)),
        ("multiply", {}, [(3, 4), (3, 4)], (3, 4)),
        ("matmul", {}, [(2, 3, 4), (2, 4, 5)], (2, 3, 5)),
        ("stack", {}, [(3, 4), (2, 4)], "found input [2, 4] float32 at slot 1, expected [3, 4] float32 as at slot 0, but for axis 1"),
        ("stack", {"axis": 2}, [(3, 4), (3, 4)], "expected one with axis 2"),
        ("multiply", {}, [(3, 4), (3, 1)], "found input [3, 1] float32 at slot 1, expected [3, 4] float32 as at slot 0"),
        ("matmul", {}, [(3, 4), (3, 4)], "found input [3, 4] float32 at slot 1, expected [4] and one more axis"),
        ("matmul", {}, [(3, 4), (4, 5), (5, 6)], "found input slot 2 at input 'x2', expected slots 0 to 1"),
        ("add", {}, [(3, 4)], "found 1 inputs, expected two or more"),
    ],
)  # fmt: skip
def test_shapes_of_several_inputs(kind, config, shapes, expected):
    drawn = network(
        node("n", kind, **config), *(entry("n", shape, slot=slot, name=f"x{slot}") for slot, shape in enumerate(shapes))
    )
    if isinstance(expected, str):
        assert expected in problems(drawn)[0]
    else:
        assert analyse(drawn).vnodes["n"].outputs == (TensorSpec(shape=expected, dtype="float32"),)


def test_sizes_beyond_any_machine_are_refused():
    assert "elements" in problems(network(node("n", "linear", in_dim=4, out_dim=2**31 - 1), entry("n", (2**20, 4))))[0]
    many = network(node("n", "reshape", target_shape=[1] * 9), entry("n", (1,)))
    assert "one to 8 integers" in problems(many)[0]


def test_embedder_needs_no_input_entry():
    analysed = analyse(network(node("tokens", "embedder", vocab_size=9, dim=4, seq_len=6)))
    (given,) = analysed.definition.inputs
    assert (given.name, given.column, given.dtype, given.shape) == ("tokens", "tokens", "int64", (6,))
    assert "without a shape" in problems(network(node("n", "relu")))[0]


def test_cost_targets():
    classes = network(node("n", "cost", cost_function="ce_logits"), entry("n", (7, 4)), cost("n"))
    assert analyse(classes).cost_targets() == (TensorSpec(shape=(7,), dtype="int64"),)
    numbers = network(node("n", "cost", cost_function="mse"), entry("n", (7, 4)), cost("n"))
    assert analyse(numbers).cost_targets() == (TensorSpec(shape=(7, 4), dtype="float32"),)


def test_normalising_twice_changes_nothing():
    for kind in CATALOGUE.values():
        for example in kind.examples:
            once = normalise_config(kind, example.config, "float32")
            assert once.problems == ()
            again = normalise_config(kind, once.config, "float32")
            assert (again.config, again.settings) == (once.config, once.settings)


def test_catalogue_is_found_by_every_name():
    for kind in CATALOGUE.values():
        for name in (kind.name, *kind.aliases):
            assert find_type(name) is kind
    assert len(catalogue_digest()) == 64


def test_flops_and_activations():
    linear = one("linear", (7, 4), in_dim=4, out_dim=3)
    assert linear.flops_per_row == 2 * 7 * 4 * 3
    assert linear.activation_bytes_per_row == 4 * 7 * 3
    attention = one("attention", (8, 16), num_heads=4, dim=16, causal=False)
    assert attention.flops_per_row == 2 * 8 * 4 * 16 * 16 + 4 * 8 * 8 * 16


def test_a_mask_may_fill_with_the_largest_number_of_its_precision():
    largest = float(np.finfo(np.float32).max)
    assert one("mask", (4, 4), mask_val=-largest).settings["mask_val"] == -largest
    wide = network(node("n", "mask", mask_val=-1e39), entry("n", (4, 4), "float64"))
    assert analyse(replace(wide, precision="float64")).vnodes["n"].settings["mask_val"] == -1e39


def test_flops_of_a_window_are_those_of_the_kernel_which_takes_a_mask():
    """It computes all products and drops those that the mask forbids; the causal kernel leaves half of them out."""
    whole, causal = (one("attention", (8, 16), num_heads=4, dim=16, causal=c).flops_per_row for c in (False, True))
    assert whole - causal == 2 * 8 * 8 * 16
    for seen in (False, True):
        windowed = one("attention", (8, 16), num_heads=4, dim=16, causal=seen, window=2)
        assert windowed.flops_per_row == whole
