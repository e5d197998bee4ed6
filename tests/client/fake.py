"""A network in memory: answers what a test put there, and keeps what was asked."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from dcnr.client.ports import Toolkit
from dcnr.config import Limits
from dcnr.errors import NotFound
from dcnr.ids import DatasetId, Epoch, NetworkId, SessionId
from dcnr.network.graph import Definition
from dcnr.protocol.messages import EventRecord, Message, RowsRef, SessionInfo
from dcnr.session.events import SessionEvent
from dcnr.session.recipe import Recipe
from dcnr.session.record import Record

QUICK = Limits(redial_first_s=0.0, redial_most_s=0.0)

Answer = Message | Exception
Script = Sequence[Message | Exception]


def record(event: SessionEvent) -> EventRecord:
    return EventRecord(sequence=1, unix_s=0.0, kind=event.kind, session="s", data=json.dumps(event.data()))


def info(**changed: Any) -> SessionInfo:
    values: dict[str, Any] = {
        "session": SessionId("s"),
        "network": NetworkId("n" * 64),
        "network_name": "net",
        "dataset": DatasetId("d" * 64),
        "state": "running",
        "reason": "",
        "step": 0,
        "steps": 10,
        "loss": 0.0,
        "committed_step": 0,
        "epoch": Epoch(1),
        "created_unix_s": 0.0,
        "placement": (),
        "record": b"{}",
    }
    return SessionInfo(**values | changed)


def session_record(dataset: DatasetId, tokenizer: str) -> bytes:
    """The record of a session on text with that tokenizer (its sha256)."""
    return Record(
        network=NetworkId("n" * 64),
        network_name="net",
        dataset=dataset,
        tokenizer=tokenizer,
        context=4,
        rows_train=9,
        rows_validation=0,
        valid_targets_per_row=4,
        recipe=Recipe(steps=10, batch_size=1, microbatches=1),
        groups=(),
        catalogue="",
        created_unix_s=0.0,
        nonce="",
    ).to_bytes()


class FakeNetwork:
    """``answers``: message class to a reply, an error, or a function of the message. ``streams``: one script a stream."""

    def __init__(
        self,
        answers: dict[type[Message], Answer | Callable[[Any], Answer]] | None = None,
        streams: Sequence[Script] = (),
    ) -> None:
        self.answers = answers or {}
        self.streams = list(streams)
        self.asked: list[Message] = []
        self.objects: dict[str, bytes] = {}
        self.datasets: dict[str, bytes] = {}
        self.closed = 0

    async def call(self, message: Message) -> Message:
        self.asked.append(message)
        answer = self.answers[type(message)]
        reply = answer(message) if callable(answer) else answer
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def stream(self, message: Message) -> AsyncIterator[Message]:
        self.asked.append(message)
        for item in self.streams.pop(0):
            if isinstance(item, Exception):
                raise item
            yield item

    async def close(self) -> None:
        self.closed += 1

    async def create_dataset(self, manifest: bytes) -> str:
        name = f"{len(self.datasets):064d}"
        self.datasets[name] = manifest
        return name

    async def get_dataset(self, name: str) -> tuple[str, bytes]:
        if name not in self.datasets:
            raise NotFound(f"no dataset {name}")
        return name, self.datasets[name]

    async def list_datasets(self) -> list[tuple[str, bytes]]:
        return list(self.datasets.items())

    async def delete_dataset(self, name: str) -> str:
        del self.datasets[name]
        return name

    async def put_dataset_object(self, key: str, data: bytes) -> None:
        self.objects[key] = data

    async def get_dataset_object(self, key: str, token: str = "") -> bytes:
        if key.startswith("sessions/"):
            assert token == "right"
        return self.objects[key]

    async def columns(self, ref: RowsRef) -> dict[str, Any]:
        raise NotImplementedError

    def toolkit(self) -> Toolkit:
        from dcnr.adapters.text import load_tokenizer, prepare_text
        from dcnr.adapters.yaml_network import load_network

        def prepare(source: Any, tokenizer: str, name: str, split: float | None, invalid_utf8: str, dtypes: Any) -> Any:
            return prepare_text(source, tokenizer=tokenizer, name=name, split=split or 0.0, invalid_utf8=invalid_utf8)

        def load(path: Path) -> Definition:
            return load_network(path)

        return Toolkit(
            open_calls=lambda address: self,
            open_data=lambda address: self,
            prepare=prepare,
            load_tokenizer=load_tokenizer,
            load_network=load,
        )
