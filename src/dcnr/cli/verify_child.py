"""The recomputing process of ``dcnr session verify``: reads a folder, prints JSON lines, ends.

A process of its own, because the number of threads reaches bits and must stand before torch is loaded.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dcnr.adapters import node_packages
from dcnr.adapters.torch.environment import prepare
from dcnr.client.blocking import Client
from dcnr.errors import DCNRError, Refused, UsageError
from dcnr.ids import VNodeId
from dcnr.network.graph import Definition, from_canonical_json
from dcnr.protocol.messages import RowsRef
from dcnr.session.record import Record
from dcnr.wiring import connect


class NetworkRows:
    """The rows of a session's dataset, fetched from the network a microbatch at a time."""

    def __init__(self, net: Client, session: str, record: Record, columns: Sequence[str]) -> None:
        self.total = record.rows_train
        self._net, self._session, self._record, self._columns = net, session, record, tuple(columns)
        self._token = ""
        self._rows: tuple[int, ...] = ()
        self._fetched: dict[str, np.ndarray[Any, Any]] = {}

    def take(self, column: str, rows: Sequence[int]) -> np.ndarray[Any, Any]:
        """All columns of the rows come at once; the next column of the same rows is there already."""
        if tuple(rows) != self._rows:
            self._fetched = self._fetch(tuple(rows))
            self._rows = tuple(rows)
        return self._fetched[column]

    def _fetch(self, rows: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
        if self._token:
            try:
                return self._ask(rows)
            except Refused:
                # Tokens are short-lived; recomputing may take longer.
                pass
        self._token = self._net.session(self._session).files().rows_token
        return self._ask(rows)

    def _ask(self, rows: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
        reference = RowsRef(
            dataset=self._record.dataset,
            split="train",
            context=self._record.context,
            rows=rows,
            columns=self._columns,
            token=self._token,
        )
        return self._net.columns(reference)


def columns_of(definition: Definition) -> list[str]:
    """Columns of the dataset that the network reads, each once."""
    names = [spec.column for spec in definition.inputs] + [cost.target for cost in definition.costs]
    return list(dict.fromkeys(names))


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def recompute(folder: Path) -> None:
    """Train from the base to the last commit and print every loss, and every state's sha256 at every commit."""
    request = json.loads((folder / "request.json").read_text())
    prepare(request["threads"])
    from dcnr.adapters.torch.numeric_class import measure
    from dcnr.oracle import Trainer

    found, _, _ = measure(request["threads"])
    if found != request["numeric_class"]:
        raise UsageError(
            f"this machine computes as class {found[:8]}, the steps were computed by class {request['numeric_class'][:8]}: "
            "nothing was compared; verify on a machine with the same processor and torch (`dcnr doctor` shows both)"
        )
    record = Record.from_bytes((folder / "record.json").read_bytes())
    definition = from_canonical_json((folder / "definition.json").read_bytes())
    commits = set(request["commits"])
    with connect(request["address"]) as net:
        rows = NetworkRows(net, request["session"], record, columns_of(definition))
        trainer = Trainer(definition, record.recipe, rows, rewrites=record.rewrites)
        if request["base_vnodes"]:
            objects = {
                VNodeId(vnode): (folder / f"{hashlib.sha256(vnode.encode()).hexdigest()}.safetensors").read_bytes()
                for vnode in request["base_vnodes"]
            }
            if request["base_step"]:
                trainer.load_states(request["base_step"], objects)
            else:
                trainer.load_weights(objects)
        while trainer.steps_done < max(commits):
            done = trainer.step()
            _say({"step": done.step, "loss": done.loss})
            if done.step in commits:
                states = {vnode: hashlib.sha256(data).hexdigest() for vnode, data in trainer.state_objects().items()}
                _say({"commit": done.step, "states": states})


def main() -> int:
    try:
        node_packages.install()
        recompute(Path(sys.argv[1]))
    except DCNRError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
