"""Networks drawn from the whole catalogue: however they are split, the bits are those of one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcnr.ids import VNodeId
from dcnr.network.analysis import Network, analyse
from dcnr.network.builder import Graph, Symbol
from dcnr.network.graph import ConfigValue, Definition
from dcnr.network.types import CATALOGUE
from dcnr.oracle import Trainer
from dcnr.session.recipe import Optimizer, Recipe
from tests.numerics.networks import with_config

LENGTH, DIM, VOCAB = 4, 8, 11
UNARY = ("relu", "gelu", "silu", "tanh", "sigmoid", "softmax", "dropout", "layernorm", "rmsnorm")


def _layer(g: Graph, kind: str, x: Symbol, other: Symbol, flag: bool) -> Symbol:
    """One more tensor of [LENGTH, DIM] from two of them, made with nodes of type ``kind``."""
    match kind:
        case "linear":
            return g.linear(x, out_dim=DIM, bias=flag)
        case "swiglu":
            return g.swiglu(g.linear(x, out_dim=2 * DIM))
        case "attention":
            window, norm = (2, "rms") if flag else (None, "none")
            return g.attention(x, num_heads=4, num_kv_heads=2, window=window, qk_norm=norm, qkv_bias=flag)
        case "attention_head":
            return g.stack(*(g.attention_head(x, head_dim=DIM // 2, bias=flag) for _ in range(2)))
        case "scale":
            return g.scale(x, factor=-0.5)
        case "broadcast":
            first, second, third = g.broadcast(x, 3)
            return g.add(first, third, second) if flag else g.add(third, second)
        case "add" | "multiply":
            return getattr(g, kind)(x, other, x) if flag else getattr(g, kind)(x, other)
        case "mask":
            scores = g.matmul(x, g.transpose(other, axes=[1, 0]))
            masked = g.mask(scores, causal=flag, random_prob=0.3, seed=7)
            return g.matmul(g.softmax(masked), other)
        case "slice":
            head = g.slice(x, axis=0, stop=1)
            return g.stack(g.slice(other, axis=0, start=1), head, axis=0)
        case "reshape":
            return g.reshape(
                g.linear(g.reshape(x, target_shape=[2, -1]), out_dim=LENGTH * DIM // 2), target_shape=[-1, DIM]
            )
        case "flatten":
            return g.reshape(g.linear(g.flatten(x), out_dim=LENGTH * DIM), target_shape=[LENGTH, DIM])
        case _:
            return getattr(g, kind)(x)


OWN_PRECISIONS: tuple[Mapping[str, ConfigValue], ...] = (
    {},
    {"precision": "bf16"},
    {"activation_precision": "float64"},
    {"param_precision": "float32"},
)
"""Of one node, whatever the network has."""

LAYERS = (
    *UNARY,
    *("linear", "swiglu", "attention", "attention_head", "scale", "broadcast", "add", "multiply", "mask", "slice"),
    *("reshape", "flatten"),
)


OWN: tuple[dict[str, ConfigValue], ...] = (
    {"trainable": False},
    *({"optimizer": kind, "lr_scale": 0.5} for kind in ("adam", "adamw", "sgd", "muon")),
    {"weight_decay": 0.2},
)
"""What a node with weights may choose for itself."""


@st.composite
def networks(draw: st.DrawFn) -> Definition:
    """Embedded tokens and a float input, layers on any of the tensors so far, one or two costs, perhaps a tied head.

    Some nodes are frozen, or trained in a way of their own."""
    precision, param_precision = draw(st.sampled_from([("float32", ""), ("bf16", ""), ("bf16", "float32")]))
    g = Graph("drawn", precision, param_precision)
    tied = draw(st.booleans())
    alias = {"alias": "tok"} if tied else {}
    h = g.embedder(
        g.input("tokens", [LENGTH], "int64"),
        vocab_size=VOCAB,
        dim=DIM,
        position_encoding=draw(st.sampled_from(["learned", "rope"])),
        **alias,
    )
    tensors = [h, h + g.input("x", [LENGTH, DIM], "float32")]
    for kind in draw(st.lists(st.sampled_from(LAYERS), min_size=2, max_size=7)):
        x, other = draw(st.sampled_from(tensors)), draw(st.sampled_from(tensors))
        # A layer reads the newest tensor at least, so that most of what is drawn reaches the cost.
        tensors.append(_layer(g, kind, draw(st.sampled_from([x, tensors[-1]])), other, draw(st.booleans())))
    last = tensors[-1]
    if tied and draw(st.booleans()):
        g.cost("tied_lm_head_ce", last, tie="tok", target="targets", label_smoothing=0.1, z_loss=0.01)
    else:
        logits = g.linear(last, tie="tok", bias=False) if tied else g.linear(last, out_dim=VOCAB)
        smoothing = draw(st.sampled_from([0.0, 0.1]))
        if draw(st.booleans()):
            g.cost("ce", g.softmax(logits), target="targets", label_smoothing=smoothing)
        else:
            g.cost("ce_logits", logits, target="targets", label_smoothing=smoothing, z_loss=smoothing)
    if draw(st.booleans()):
        g.cost("mse", draw(st.sampled_from(tensors)), target="y", weight=0.3)
    definition = g.definition()
    own: Mapping[str, ConfigValue] = draw(st.sampled_from(OWN_PRECISIONS))
    chosen = draw(st.integers(0, len(definition.nodes) - 1))
    nodes = list(definition.nodes)
    nodes[chosen] = replace(nodes[chosen], config={**nodes[chosen].config, **own})
    definition = analyse(replace(definition, nodes=tuple(nodes))).definition
    owners = [vnode for vnode, info in analyse(definition).vnodes.items() if info.parameters]
    return with_config(definition, draw(st.dictionaries(st.sampled_from(owners), st.sampled_from(OWN), max_size=4)))


@st.composite
def placements(draw: st.DrawFn, network: Network) -> dict[VNodeId, str]:
    hosts: dict[VNodeId, str] = {}
    for unit in network.placement_units():
        host = draw(st.sampled_from("abc"))
        hosts.update((vnode, host) for group in unit for vnode in network.groups[group].vnodes)
    return hosts


def _rows(seed: int) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(seed)
    targets = random.integers(0, VOCAB, (12, LENGTH))
    targets[random.random(targets.shape) < 0.2] = -100
    return {
        "tokens": random.integers(0, VOCAB, (12, LENGTH)),
        "x": random.normal(size=(12, LENGTH, DIM)).astype("float32"),
        "targets": targets,
        "y": random.normal(size=(12, LENGTH, DIM)).astype("float32"),
    }


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_split_of_any_network_has_the_bits_of_one_process(data: st.DataObject) -> None:
    network = analyse(data.draw(networks(), "network"))
    recipe = Recipe(
        steps=3,
        batch_size=4,
        microbatches=data.draw(st.sampled_from([1, 2, 4]), "microbatches"),
        seed=data.draw(st.integers(0, 99), "seed"),
        optimizer=Optimizer(
            kind=data.draw(st.sampled_from(["adamw", "adam", "sgd", "muon"]), "optimizer"),
            lr=1e-2,
            momentum=data.draw(st.sampled_from([0.0, 0.9]), "momentum"),
            weight_decay=data.draw(st.sampled_from([0.0, 0.1]), "weight decay"),
        ),
        clip_norm=data.draw(st.sampled_from([0.0, 0.5]), "clip norm"),
        clip_scope=data.draw(st.sampled_from(["network", "vnode"]), "clip scope"),
    )
    rows = _rows(recipe.seed)
    whole = Trainer(network, recipe, rows)
    split = Trainer(network, recipe, rows, placement=data.draw(placements(network), "placement"))
    for _ in range(3):
        assert whole.step() == split.step()
    assert whole.state_objects() == split.state_objects()


def test_every_type_and_every_choice_is_drawn() -> None:
    nodes: set[str] = set()
    chosen: list[dict[str, ConfigValue]] = []

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(definition=networks())
    def collect(definition: Definition) -> None:
        nodes.update(node.type for node in definition.nodes)
        chosen.extend(own for node in definition.nodes for own in OWN if own.items() <= node.config.items())

    collect()
    assert nodes == CATALOGUE.keys()
    assert all(own in chosen for own in OWN)
