"""Microbatches that a session's owner has opened: references to their rows, never the rows themselves."""

from __future__ import annotations

from dcnr.ids import PeerId, SessionId, VNodeId
from dcnr.network.analysis import Network
from dcnr.orchestrator.desk import Desk
from dcnr.orchestrator.targets import Targets
from dcnr.protocol import messages as m
from dcnr.session.log import Fold
from dcnr.session.record import Record
from dcnr.session.rows import microbatch_rows

Key = tuple[int, int]
"""(step, microbatch)."""


class Opens:
    """What was sent to the hosts of sources and costs, and which of them have not answered: it is said again to them."""

    def __init__(self, *, desk: Desk, id: SessionId, network: Network, record: Record, targets: Targets) -> None:
        self.targets = targets
        self._desk = desk
        self._id = id
        self._network = network
        self._record = record
        self._columns = _needed_columns(network)
        self._opened: dict[Key, dict[PeerId, m.OpenMicrobatch]] = {}
        self._waiting: dict[Key, set[PeerId]] = {}

    def open(self, fold: Fold, step: int, microbatch: int, *, done_step: int) -> None:
        """Tell the hosts of ``fold``'s placement which rows a microbatch has."""
        record = self._record
        token = self._desk.token(f"rows/{record.dataset}")
        by_peer: dict[PeerId, dict[str, None]] = {}
        for vnode, columns in self._columns.items():
            by_peer.setdefault(fold.placement[vnode].peer, {}).update(dict.fromkeys(columns))
        rows, valid = self._rows(step, microbatch, record.recipe.rows), self.valid_targets(step)
        messages = {
            peer: m.OpenMicrobatch(
                session=self._id,
                epoch=fold.epoch,
                instance=fold.instance,
                step=step,
                microbatch=microbatch,
                rows=(
                    m.RowsRef(
                        dataset=record.dataset,
                        split="train",
                        context=record.context,
                        rows=rows,
                        columns=tuple(columns),
                        token=token,
                    ),
                ),
                valid_targets=valid,
                done_step=done_step,
            )
            for peer, columns in by_peer.items()
        }
        self._opened[(step, microbatch)] = messages
        self._waiting[(step, microbatch)] = set(messages)
        for peer, message in messages.items():
            self._desk.send(peer, message)

    def valid_targets(self, step: int) -> tuple[m.CostTargets, ...]:
        """Per cost: how many targets of the step count, in all its microbatches together."""
        batch_size = self._record.recipe.batch_size
        if self._record.valid_targets_per_row >= 0:
            return self.targets.of(self._network, "train", range(batch_size))  # Rows that all count the same.
        return self.targets.of(self._network, "train", self._rows(step, 0, batch_size))

    def _rows(self, step: int, microbatch: int, rows: int) -> tuple[int, ...]:
        recipe = self._record.recipe
        return microbatch_rows(
            step=step,
            microbatch=microbatch,
            batch_size=recipe.batch_size,
            rows=rows,
            total=self._record.rows_train,
            seed=recipe.seed,
        )

    def answered(self, peer: PeerId, answer: m.TaskAnswer) -> None:
        waiting = self._waiting.get((answer.step, answer.microbatch))
        if waiting is None:
            return
        if answer.accepted:
            waiting.discard(peer)
        else:
            self._desk.emit("task_refused", self._id, {"peer": peer, "reason": answer.reason})

    def done(self, step: int, microbatch: int) -> None:
        self._opened.pop((step, microbatch), None)
        self._waiting.pop((step, microbatch), None)

    def say_again(self, peer: PeerId) -> None:
        """A link is new: an older one may have lost what was not answered."""
        for key, messages in self._opened.items():
            if peer in messages and peer in self._waiting[key]:
                self._desk.send(peer, messages[peer])

    def clear(self) -> None:
        """Another placement, or none."""
        self._opened = {}
        self._waiting = {}


def _needed_columns(network: Network) -> dict[VNodeId, tuple[str, ...]]:
    """Columns by VNode: what its inputs and costs take from the dataset."""
    found: dict[VNodeId, tuple[str, ...]] = {}
    for entry in network.definition.inputs:
        found[entry.node_id] = (*found.get(entry.node_id, ()), entry.column)
    for cost in network.definition.costs:
        found[cost.node_id] = (*found.get(cost.node_id, ()), cost.target)
    return found
