"""What a network costs, counted from its definition alone: the figures of ``dcnr network analyze``.

Work is in FLOPs of the forward pass; a training step costs about three times that. Bytes are those that admission and
placement reckon with, so what is printed here is what a PNode will be asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dcnr.ids import VNodeId
from dcnr.network.analysis import Network
from dcnr.network.memory import Memory, edge_bytes, memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """VNodes hosted together: one alone, a kernel group, or the whole network.

    What several parts need is not the sum of what each needs alone, for tensors that arrive from another host are held
    there too.
    """

    vnodes: tuple[VNodeId, ...]
    parameters: int
    flops_per_row: int
    training: Memory
    serving: Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeFigures:
    """``bytes_per_microbatch`` cross a link forward, and where ``gradient``, as many come back."""

    index: int
    bytes_per_row: int
    bytes_per_microbatch: int
    gradient: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    total: Part
    tokens_per_row: int
    vnodes: tuple[Part, ...]
    """In the file's order."""
    groups: tuple[Part, ...]
    """By index."""
    edges: tuple[EdgeFigures, ...]
    """In the file's order."""

    @property
    def flops_per_token(self) -> float:
        """Forward."""
        return self.total.flops_per_row / self.tokens_per_row


def tokens_per_row(network: Network) -> int:
    """Elements of the longest integer input; 1 where a network takes none: a row of columns counts as one token."""
    return max((math.prod(entry.shape) for entry in network.definition.inputs if entry.dtype == "int64"), default=1)


def figures(network: Network, *, rows: int, window: int, optimizer: str, momentum: float) -> Figures:
    """``rows`` of a microbatch, ``window`` open microbatches; ``optimizer`` and ``momentum`` are the session's."""

    def part(vnodes: Iterable[VNodeId]) -> Part:
        members = tuple(vnodes)
        infos = [network.vnodes[vnode] for vnode in members]

        def need(training: bool) -> Memory:
            return memory(
                network,
                members,
                rows=rows,
                window=window,
                training=training,
                optimizer=optimizer,
                momentum=momentum,
            )

        return Part(
            vnodes=members,
            parameters=sum(p.elements for info in infos for p in info.parameters),
            flops_per_row=sum(info.flops_per_row for info in infos),
            training=need(True),
            serving=need(False),
        )

    alone = {vnode: part((vnode,)) for vnode in network.vnodes}
    return Figures(
        total=part(network.vnodes),
        tokens_per_row=tokens_per_row(network),
        vnodes=tuple(alone.values()),
        groups=tuple(
            part(group.vnodes) if len(group.vnodes) > 1 else alone[group.vnodes[0]] for group in network.groups
        ),
        edges=tuple(
            EdgeFigures(
                index=index,
                bytes_per_row=edge_bytes(network, index),
                bytes_per_microbatch=rows * edge_bytes(network, index),
                gradient=index in network.gradient_edges,
            )
            for index in range(len(network.definition.edges))
        ),
    )
