"""``dcnr.Client``: the blocking twin of :class:`~dcnr.client.connect.AsyncClient`.

It runs a loop of its own in a thread, so it works wherever plain Python does, a notebook included.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Coroutine, Generator, Mapping
from typing import TYPE_CHECKING, Any, Self, TypeVar

from dcnr.client.connect import AsyncClient, Model
from dcnr.client.ports import DataSource, Toolkit
from dcnr.client.run import AsyncRun, Validation
from dcnr.errors import UsageError
from dcnr.ids import DatasetId, NetworkId, PeerId, SessionId, VNodeId
from dcnr.network.graph import Definition
from dcnr.protocol.messages import EventRecord, NetworkInfo, NodeInfo, RowsRef, SessionFiles, SessionInfo, Status
from dcnr.session.checkpoint import Manifest
from dcnr.session.events import SessionEvent
from dcnr.session.recipe import Optimizer, Schedule

if TYPE_CHECKING:
    from dcnr.client.forward import Outputs

T = TypeVar("T")


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dcnr-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for ``work`` on the loop; an interrupt of the waiting thread cancels it. Raises :class:`UsageError` once
        the loop has ended."""
        if self._loop.is_closed():
            work.close()
            raise UsageError("this client is closed: connect again")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def iterate(self, items: AsyncIterator[T]) -> Generator[T]:
        """The items of an asynchronous iterator, one loop turn each."""
        end = object()
        asking: asyncio.Task[Any] | None = None

        async def following() -> T | object:
            nonlocal asking
            asking = asyncio.current_task()
            return await anext(items, end)

        async def close() -> None:
            if asking is not None and not asking.done():
                await asyncio.wait({asking})  # Interrupted and cancelled, but not over yet.
            closing = getattr(items, "aclose", None)
            if closing is not None:
                await closing()

        try:
            while (item := self.run(following())) is not end:
                yield item  # type: ignore[misc]
        finally:
            # An iterator that outlives its client has nothing left to close. On the loop's own thread (where the garbage
            # collector may run this) and at the end of the program, waiting for the loop would wait for ever.
            if sys.is_finalizing() or self._loop.is_closed():
                pass
            elif threading.current_thread() is self._thread:
                self._loop.create_task(close())
            else:
                self.run(close())

    def stop(self) -> None:
        """End what still runs on the loop (its waiters get ``CancelledError``), then the loop and its thread."""
        if self._loop.is_closed():
            return
        self.run(self._cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancel_others(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_asyncgens()


class Run:
    """One training session. Iterate it for its events; see :class:`~dcnr.client.run.AsyncRun`."""

    def __init__(self, run: AsyncRun, loop: LoopThread) -> None:
        self._run = run
        self._loop = loop

    @property
    def id(self) -> SessionId:
        return self._run.id

    @property
    def losses(self) -> dict[int, float]:
        """Loss per step, as far as this object has seen it."""
        return self._run.losses

    def __iter__(self) -> Generator[SessionEvent]:
        return self.events()

    def events(self, after_step: int = 0) -> Generator[SessionEvent]:
        return self._loop.iterate(self._run.events(after_step))

    def info(self) -> SessionInfo:
        return self._loop.run(self._run.info())

    def validate(self) -> Validation:
        return self._loop.run(self._run.validate())

    def files(self) -> SessionFiles:
        return self._loop.run(self._run.files())

    def manifest(self, files: SessionFiles, step: int | None = None) -> Manifest:
        return self._loop.run(self._run.manifest(files, step))

    def initial(self, files: SessionFiles) -> Manifest | None:
        return self._loop.run(self._run.initial(files))

    def state_object(self, files: SessionFiles, manifest: Manifest, vnode: VNodeId) -> bytes:
        return self._loop.run(self._run.state_object(files, manifest, vnode))

    def stop(self) -> str:
        return self._loop.run(self._run.stop())

    def suspend(self) -> str:
        return self._loop.run(self._run.suspend())

    def collect_garbage(self, delete: bool = False) -> tuple[str, ...]:
        return self._loop.run(self._run.collect_garbage(delete))

    def resume(self) -> str:
        return self._loop.run(self._run.resume())

    def state_dict(self, as_torch: bool = False) -> dict[str, Any]:
        return self._loop.run(self._run.state_dict(as_torch))

    def generate(
        self, prompt: str, max_tokens: int = 64, temperature: float = 0.8, top_p: float = 1.0, seed: int = 0
    ) -> Generator[str]:
        return self._loop.iterate(self._run.generate(prompt, max_tokens, temperature, top_p, seed))


class Client:
    """A client of one network. Use as a context manager, or call :meth:`close`."""

    def __init__(self, address: str, toolkit: Toolkit) -> None:
        self._loop = LoopThread()

        async def open_client() -> AsyncClient:
            return AsyncClient(address, toolkit)

        self._client = self._loop.run(open_client())

    @property
    def address(self) -> str:
        return self._client.address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._loop.run(self._client.close())
        self._loop.stop()

    def nodes(self) -> tuple[NodeInfo, ...]:
        return self._loop.run(self._client.nodes())

    def drain(self, peer: str, on: bool = True) -> PeerId:
        return self._loop.run(self._client.drain(peer, on))

    def status(self) -> Status:
        return self._loop.run(self._client.status())

    def networks(self) -> tuple[NetworkInfo, ...]:
        return self._loop.run(self._client.networks())

    def network(self, name: str) -> tuple[NetworkId, Definition]:
        return self._loop.run(self._client.network(name))

    def create_network(self, model: Model) -> NetworkId:
        return self._loop.run(self._client.create_network(model))

    def datasets(self) -> list[tuple[DatasetId, bytes]]:
        return self._loop.run(self._client.datasets())

    def dataset(self, name: str) -> tuple[DatasetId, bytes]:
        return self._loop.run(self._client.dataset(name))

    def add_data(
        self,
        source: DataSource,
        *,
        name: str = "",
        tokenizer: str = "bpe:4096",
        split: float | None = None,
        invalid_utf8: str = "refuse",
        dtypes: Mapping[str, str] | None = None,
    ) -> DatasetId:
        """See :meth:`~dcnr.client.connect.AsyncClient.add_data`."""
        return self._loop.run(
            self._client.add_data(
                source, name=name, tokenizer=tokenizer, split=split, invalid_utf8=invalid_utf8, dtypes=dtypes
            )
        )

    def delete_data(self, name: str) -> DatasetId:
        """See :meth:`~dcnr.client.connect.AsyncClient.delete_data`."""
        return self._loop.run(self._client.delete_data(name))

    def columns(self, ref: RowsRef) -> dict[str, Any]:
        """Rows of a dataset, against a token of :meth:`Run.files`: column to array of shape [rows, ...]."""
        return self._loop.run(self._client.data.columns(ref))

    def sessions(self) -> tuple[SessionInfo, ...]:
        return self._loop.run(self._client.sessions())

    def session(self, name: str) -> Run:
        return Run(self._loop.run(self._client.session(name)), self._loop)

    def events(self, after: int = 0, follow: bool = False) -> Generator[EventRecord]:
        return self._loop.iterate(self._client.events(after, follow))

    def train(
        self,
        model: Model,
        data: DataSource,
        *,
        steps: int,
        tokenizer: str | None = None,
        batch_size: int = 8,
        microbatches: int = 4,
        optimizer: Optimizer | None = None,
        schedule: Schedule | None = None,
        clip_norm: float = 1.0,
        clip_scope: str = "network",
        precision: str = "",
        checkpoint_every: int = 20,
        eval_every: int = 0,
        eval_batches: int = 4,
        init_from: str = "",
        seed: int = 0,
    ) -> Run:
        """Create what is missing, then a session; see :meth:`AsyncClient.train`."""
        run = self._client.train(
            model,
            data,
            steps=steps,
            tokenizer=tokenizer,
            batch_size=batch_size,
            microbatches=microbatches,
            optimizer=optimizer,
            schedule=schedule,
            clip_norm=clip_norm,
            clip_scope=clip_scope,
            precision=precision,
            checkpoint_every=checkpoint_every,
            eval_every=eval_every,
            eval_batches=eval_batches,
            init_from=init_from,
            seed=seed,
        )
        return Run(self._loop.run(run), self._loop)

    def forward(self, model: Model, inputs: Mapping[str, Any]) -> Outputs:
        """Every declared output for explicit tensors; see :meth:`AsyncClient.forward`."""
        return self._loop.run(self._client.forward(model, inputs))

    def newest_commit(self, target: str) -> SessionInfo:
        return self._loop.run(self._client.newest_commit(target))

    def generate(
        self,
        target: str,
        prompt: str,
        max_tokens: int = 64,
        temperature: float = 0.8,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Generator[str]:
        return self._loop.iterate(self._client.generate(target, prompt, max_tokens, temperature, top_p, seed))
