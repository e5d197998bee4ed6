"""Rewrites: parts of a network that are written one way and computed another.

They depend on the file alone, run before placement, touch only what they recognise whole, and never a declared output
or what a metric names. A session's record names those that it was trained with. What they replace keeps its weights:
:func:`as_written` and :func:`as_run` turn the one form's tensors into the other's.

``attention_heads``: ``attention_head`` nodes that are alike, read one tensor and are stacked become one ``attention``
without output projection, under the id of the ``stack``; not where they name Muon as their optimizer, which works on
each node's matrices as wholes. What a session chooses is no part of the file: its Muon, and clipping by each VNode's own
norm (``--clip-scope vnode``), take the rewritten node as their unit, not its heads. ``tied_head``: a tied ``linear`` that feeds nothing but a
``ce_logits`` cost becomes ``tied_lm_head_ce`` under the cost's id; in training alone, since elsewhere the logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from dcnr.ids import VNodeId
from dcnr.network.analysis import Network, VNodeInfo, analyse
from dcnr.network.graph import ConfigValue, Definition, Edge, Node
from dcnr.network.types import COMMON_KEYS

TRAINING = ("attention_heads", "tied_head")
"""In the order in which they run."""
SERVING = ("attention_heads",)

T = TypeVar("T")

_COST_KEYS = ("ignore_index", "cost_precision", "label_smoothing", "z_loss")
_COLOCATION = ("colocate_group", "colocate_policy")
_COMMON = tuple(key.name for key in COMMON_KEYS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """Nodes to replace, by id, and to leave out; ``edges`` by index, ``None`` = left out."""

    nodes: Mapping[VNodeId, Node | None]
    edges: Mapping[int, Edge | None]


def rewritten(network: Network, names: Collection[str]) -> Network:
    """``network`` as it is run: its id stays, ``rewrites`` names those of ``names`` that changed something.

    ``network`` itself where none does. VNodes keep their places in ``nodes``, edges their order.
    """
    run = network
    for name in TRAINING:
        if name not in names:
            continue
        change = _RULES[name](run)
        if not change.nodes:
            continue
        given = run.definition
        nodes = (change.nodes.get(node.id, node) for node in given.nodes)
        edges = (change.edges.get(index, edge) for index, edge in enumerate(given.edges))
        definition = replace(
            given,
            nodes=tuple(node for node in nodes if node is not None),
            edges=tuple(edge for edge in edges if edge is not None),
        )
        heads = dict(run.heads)
        if name == "attention_heads":
            heads |= {vnode: _stacked(run, vnode) for vnode, node in change.nodes.items() if node is not None}
        run = replace(analyse(definition), id=network.id, rewrites=(*run.rewrites, name), heads=heads)
    return run


def as_written(network: Network, tensors: Mapping[str, T], rows: Callable[[T, int, int], T]) -> dict[str, T]:
    """Tensors by ``<node id>.<name>`` of a rewritten network, under the keys of the file.

    ``rows(tensor, first, last)`` cuts along the first axis.
    """
    found: dict[str, T] = {}
    for vnode, info in network.vnodes.items():
        heads = network.heads.get(vnode, ())
        for spec in info.parameters:
            tensor = tensors[f"{vnode}.{spec.name}"]
            size = spec.shape[0] // len(heads) if heads else 0
            for number, head in enumerate(heads):
                found[f"{head}.{spec.name}"] = rows(tensor, number * size, (number + 1) * size)
            if not heads:
                found[f"{vnode}.{spec.name}"] = tensor
    return found


def as_run(network: Network, tensors: Mapping[str, T], joined: Callable[[Sequence[T]], T]) -> dict[str, T]:
    """The inverse of :func:`as_written`; ``joined`` puts tensors together along the first axis."""
    found: dict[str, T] = {}
    for vnode, info in network.vnodes.items():
        for spec in info.parameters:
            heads = network.heads.get(vnode, ())
            key = f"{vnode}.{spec.name}"
            found[key] = joined([tensors[f"{head}.{spec.name}"] for head in heads]) if heads else tensors[key]
    return found


def computed_in(written: Network, run: Network) -> dict[VNodeId, tuple[VNodeId, str]]:
    """Nodes of the file that a rewrite computes inside another: the other, and the rewrite's name."""
    found = {head: (stack, "attention_heads") for stack, heads in run.heads.items() for head in heads}
    for vnode, info in run.vnodes.items():
        if (info.node.type, written.vnodes[vnode].node.type) == ("tied_lm_head_ce", "cost"):
            head = _source(written, written.vnodes[vnode])
            assert head is not None
            found[head.node.id] = (vnode, "tied_head")
    return found


# --- what is touched by nothing ------------------------------------------------------------------------------


def _named(definition: Definition) -> frozenset[VNodeId]:
    """Nodes that somebody asks for by name: their tensors must exist."""
    outputs = (entry.node_id for entry in definition.outputs)
    return frozenset([*outputs, *(entry.node_id for entry in definition.metrics)])


def _only_reader(network: Network, info: VNodeInfo) -> int | None:
    """The one edge that reads the node's one output."""
    readers = [edge for slot in info.out_edges for edge in slot]
    return readers[0] if len(info.out_edges) == 1 and len(readers) == 1 else None


def _source(network: Network, info: VNodeInfo) -> VNodeInfo | None:
    """The node before a node of one input, where it is no input of the network."""
    (edge,) = info.in_edges
    return None if edge is None else network.vnodes[network.definition.edges[edge].source]


# --- attention heads -----------------------------------------------------------------------------------------


def _stacked(network: Network, stack: VNodeId) -> tuple[VNodeId, ...]:
    """Sources of a stack's inputs, in slot order."""
    edges = (edge for edge in network.vnodes[stack].in_edges if edge is not None)
    return tuple(network.definition.edges[edge].source for edge in edges)


def _attention_heads(network: Network) -> _Change:
    named = _named(network.definition)
    nodes: dict[VNodeId, Node | None] = {}
    edges: dict[int, Edge | None] = {}
    for node in network.definition.nodes:
        if node.type != "stack" or node.id in named:
            continue
        stack = network.vnodes[node.id]
        heads = [network.vnodes[vnode] for vnode in _stacked(network, node.id)]
        if len(heads) < len(stack.inputs) or not _alike(network, stack, heads) or named & {h.node.id for h in heads}:
            continue
        settings = heads[0].settings
        config: dict[str, ConfigValue] = {
            "num_heads": len(heads),
            "dim": stack.outputs[0].shape[-1],
            "head_dim": settings["head_dim"],
            "input_dim": settings["input_dim"],
            "qkv_bias": settings["bias"],
            "output_projection": False,
        }
        for key in ("seq_len", "causal", "position_encoding", "rope_theta", *_COMMON):
            # As given: both types have the same defaults.
            config[key] = heads[0].node.config.get(key)
        nodes[node.id] = Node(id=node.id, type="attention", config=config, at=node.at)
        for index in stack.in_edges:
            assert index is not None
            edges[index] = None
        for number, head in enumerate(heads):
            nodes[head.node.id] = None
            (index,) = head.in_edges
            assert index is not None
            # The first head's edge goes to the whole; the others' slots, or readings of one slot, end.
            first = replace(network.definition.edges[index], target=node.id, target_slot=0)
            edges[index] = first if number == 0 else None
    return _Change(nodes=nodes, edges=edges)


def _alike(network: Network, stack: VNodeInfo, heads: Sequence[VNodeInfo]) -> bool:
    """Heads of one kind, in one kernel group with their stack, that read one tensor and are read by the stack alone."""
    first = heads[0]
    if first.node.type != "attention_head" or stack.settings["axis"] not in (-1, len(stack.outputs[0].shape) - 1):
        return False
    before = _source(network, first)
    if before is None or len({head.node.id for head in heads}) != len(heads):
        return False
    if first.settings["optimizer"] == "muon":
        # It orthogonalises a matrix as a whole: the heads' stacked matrix would be trained otherwise than each head's.
        return False
    for head in heads:
        if head.node.type != first.node.type or head.settings != first.settings:
            return False
        if _only_reader(network, head) is None or not _same_tensor(network, first, head):
            return False
    if stack.outputs[0].dtype != first.outputs[0].dtype:
        return False
    # One unit of numerics before and after: heads that a file keeps apart may be placed apart.
    return _colocation(stack) == _colocation(first)


def _same_tensor(network: Network, one: VNodeInfo, other: VNodeInfo) -> bool:
    """Both read the same slot, or slots of the same ``broadcast``."""
    first, second = one.in_edges[0], other.in_edges[0]
    if first is None or second is None:
        return False
    a, b = network.definition.edges[first], network.definition.edges[second]
    return a.source == b.source and (
        a.source_slot == b.source_slot or network.vnodes[a.source].node.type == "broadcast"
    )


def _colocation(info: VNodeInfo) -> tuple[ConfigValue, ConfigValue]:
    return info.settings["colocate_group"], info.settings["colocate_policy"]


# --- a tied head with its cost -------------------------------------------------------------------------------


def _tied_head(network: Network) -> _Change:
    named = _named(network.definition)
    nodes: dict[VNodeId, Node | None] = {}
    edges: dict[int, Edge | None] = {}
    for entry in network.definition.costs:
        cost = network.vnodes[entry.node_id]
        if cost.node.type != "cost" or cost.settings["cost_function"] != "ce_logits":
            continue
        head = _source(network, cost)
        if head is None or head.node.type != "linear" or head.tied_to is None or head.settings["bias"]:
            continue
        if named & {head.node.id, cost.node.id} or _colocation(head) != _colocation(cost):
            continue
        (reading,), between = head.in_edges, _only_reader(network, head)
        if reading is None or between is None:
            continue
        config: dict[str, ConfigValue] = {
            key: head.node.config.get(key) for key in ("in_dim", "out_dim", "tie_weight_alias", *_COLOCATION)
        }
        # As settled, not as given: a default may follow from precisions of the nodes that end here.
        config |= {key: cost.settings[key] for key in _COST_KEYS}
        nodes[head.node.id] = None
        nodes[cost.node.id] = Node(id=cost.node.id, type="tied_lm_head_ce", config=config, at=cost.node.at)
        edges[between] = None
        edges[reading] = replace(network.definition.edges[reading], target=cost.node.id, target_slot=0)
    return _Change(nodes=nodes, edges=edges)


_RULES: Mapping[str, Callable[[Network], _Change]] = {"attention_heads": _attention_heads, "tied_head": _tied_head}
