"""``dcnr network analyze``: what a network file costs, without a network of PNodes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcnr.cli.output import JsonOption, command, number, print_fields, print_json, print_table, say, size
from dcnr.cli.training import make_optimizer
from dcnr.errors import UsageError

if TYPE_CHECKING:
    from dcnr.ids import VNodeId
    from dcnr.network.analysis import Network
    from dcnr.network.figures import Figures, Part
    from dcnr.network.memory import Memory
    from dcnr.network.node_type import TensorSpec
    from dcnr.session.recipe import Recipe

BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Rows of a step.")]
MicrobatchesOption = Annotated[int, typer.Option("--microbatches", min=1, help="Slices of a batch; must divide it.")]
OptimizerOption = Annotated[str, typer.Option("--optimizer", help="adamw, adam, sgd or muon.")]
MomentumOption = Annotated[
    float | None, typer.Option("--momentum", help="Of sgd and muon. Default: 0.95 for muon, 0 for sgd.")
]


def costing_recipe(batch_size: int, microbatches: int, optimizer: str, momentum: float | None) -> Recipe:
    """A recipe of which only what costs memory or time is meant. Raises :class:`UsageError` as ``dcnr train`` does."""
    from dcnr.session.recipe import AdamW, Recipe

    chosen = make_optimizer(optimizer, AdamW().lr, None, None, None, momentum)
    return Recipe(steps=1, batch_size=batch_size, microbatches=microbatches, optimizer=chosen)


def read_network(file: Path) -> Network:
    """The analysed network of a file, as it is written."""
    from dcnr.adapters.yaml_network import load_analysed

    if not file.is_file():
        raise UsageError(f"no network file {file}")
    return load_analysed(file)


@command
def analyze(
    file: Annotated[Path, typer.Argument(help="A network file (YAML).")],
    batch_size: BatchOption = 8,
    microbatches: MicrobatchesOption = 4,
    window: Annotated[
        int, typer.Option(min=1, help="Open microbatches; with one PNode it is 2, each further stage adds one.")
    ] = 2,
    optimizer: OptimizerOption = "adamw",
    momentum: MomentumOption = None,
    rewrites: Annotated[bool, typer.Option("--rewrites", help="The network as a session trains it.")] = False,
    json: JsonOption = False,
) -> None:
    """Shapes, parameters, FLOPs, memory and bytes per edge of a network file, offline."""
    from dcnr.network.figures import figures
    from dcnr.network.rewrite import TRAINING, rewritten

    recipe = costing_recipe(batch_size, microbatches, optimizer, momentum)
    network = read_network(file)
    if rewrites:
        network = rewritten(network, TRAINING)
    found = figures(
        network,
        rows=recipe.rows,
        window=window,
        optimizer=recipe.optimizer.kind,
        momentum=recipe.optimizer.momentum,
    )
    if json:
        print_json(as_json(network, found, recipe, window))
    else:
        print_figures(network, found, recipe, window)


def as_json(network: Network, found: Figures, recipe: Recipe, window: int) -> dict[str, Any]:
    """The whole of it as one document."""
    edges = network.definition.edges
    return {
        "network": network.id,
        "name": network.definition.name,
        "precision": network.definition.precision,
        "param_precision": network.definition.param_precision or network.definition.precision,
        "rewrites": list(network.rewrites),
        "rows_per_microbatch": recipe.rows,
        "window": window,
        "optimizer": recipe.optimizer.kind,
        "tokens_per_row": found.tokens_per_row,
        "flops_per_token": found.flops_per_token,
        **_part(found.total),
        "vnodes": [_vnode(network, part) for part in found.vnodes],
        "kernel_groups": [
            {"index": index, "vnodes": list(part.vnodes), **_part(part)} for index, part in enumerate(found.groups)
        ],
        "edges": [
            {
                "index": edge.index,
                "from": edges[edge.index].source,
                "from_slot": edges[edge.index].source_slot,
                "to": edges[edge.index].target,
                "to_slot": edges[edge.index].target_slot,
                "bytes_per_row": edge.bytes_per_row,
                "bytes_per_microbatch": edge.bytes_per_microbatch,
                "gradient": edge.gradient,
            }
            for edge in found.edges
        ],
    }


def _vnode(network: Network, part: Part) -> dict[str, Any]:
    (vnode,) = part.vnodes
    info = network.vnodes[vnode]
    return {
        "vnode": vnode,
        "type": info.node.type,
        "kernel_group": info.group,
        "inputs": [{"shape": list(spec.shape), "dtype": spec.dtype} for spec in info.inputs],
        "outputs": [{"shape": list(spec.shape), "dtype": spec.dtype} for spec in info.outputs],
        **_part(part),
    }


def _part(part: Part) -> dict[str, Any]:
    return {
        "parameters": part.parameters,
        "flops_per_row": part.flops_per_row,
        "training": _memory(part.training),
        "serving": _memory(part.serving),
    }


def _memory(memory: Memory) -> dict[str, int]:
    return {f"{name}_bytes": count for name, count in (*_by_holder(memory), ("total", memory.total))}


def _by_holder(memory: Memory) -> list[tuple[str, int]]:
    """Its fields; ``asdict`` would copy each value deeply, which shows with 10,000 nodes."""
    return [(field.name, getattr(memory, field.name)) for field in fields(memory)]


def print_figures(network: Network, found: Figures, recipe: Recipe, window: int) -> None:
    """For people: totals, then a table each for VNodes, kernel groups of several VNodes, and edges."""
    total = found.total
    print_fields(
        {
            "network": f"{network.definition.name}, {network.id[:12]}",
            "precision": network.definition.shown_precision,
            "rewrites": ", ".join(network.rewrites) or "none",
            "vnodes": f"{len(network.vnodes)} in {len(network.groups)} kernel groups",
            "parameters": f"{total.parameters:,}",
            "FLOPs": f"{number(found.flops_per_token)} per token, {number(total.flops_per_row)} per row "
            f"of {found.tokens_per_row}, forward; a training step takes about three times that",
            "training": f"{size(total.training.total)} on one PNode: {_spent(total.training)}",
            "serving": f"{size(total.serving.total)}",
            "counted with": f"{recipe.rows} rows per microbatch, {window} microbatches open, {recipe.optimizer.kind}",
        }
    )
    say("")
    print_table(
        ("vnode", "type", "group", "outputs", "params", "FLOPs/row", "training", "serving"),
        (
            (
                *part.vnodes,
                network.vnodes[part.vnodes[0]].node.type,
                network.vnodes[part.vnodes[0]].group,
                _outputs(network.vnodes[part.vnodes[0]].outputs),
                *_cells(part),
            )
            for part in found.vnodes
        ),
    )
    several = [(index, part) for index, part in enumerate(found.groups) if len(part.vnodes) > 1]
    if several:
        say("")
        print_table(
            ("kernel group", "vnodes", "parameters", "FLOPs/row", "training", "serving"),
            ((index, _span(part.vnodes), *_cells(part)) for index, part in several),
        )
    if found.edges:
        say("")
        edges = network.definition.edges
        print_table(
            ("edge", "from", "to", "bytes/microbatch", "gradient"),
            (
                (
                    edge.index,
                    _slot(edges[edge.index].source, edges[edge.index].source_slot),
                    _slot(edges[edge.index].target, edges[edge.index].target_slot),
                    size(edge.bytes_per_microbatch),
                    "the same" if edge.gradient else "-",
                )
                for edge in found.edges
            ),
        )


def _outputs(specs: tuple[TensorSpec, ...]) -> str:
    """Shapes; those of a broadcast are all alike."""
    if len(specs) > 1 and len(set(specs)) == 1:
        return f"{len(specs)} x {list(specs[0].shape)}"
    return " ".join(str(list(spec.shape)) for spec in specs)


def _spent(memory: Memory) -> str:
    return ", ".join(f"{name} {size(count)}" for name, count in _by_holder(memory))


def _cells(part: Part) -> tuple[str, ...]:
    return (
        f"{part.parameters:,}",
        number(part.flops_per_row),
        size(part.training.total),
        size(part.serving.total),
    )


def _span(vnodes: tuple[VNodeId, ...]) -> str:
    return f"{len(vnodes)}: {vnodes[0]} to {vnodes[-1]}"


def _slot(vnode: VNodeId, slot: int) -> str:
    return f"{vnode}:{slot}" if slot else vnode
