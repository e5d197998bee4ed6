"""A session as its client sees it: events once each and in order, weights, text."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING, Any

from dcnr.errors import NotFound, ProtocolError, Refused, SessionFailed, Unavailable, UnknownName
from dcnr.ids import SessionId, VNodeId
from dcnr.network.analysis import analyse
from dcnr.network.graph import Definition, from_canonical_json
from dcnr.network.rewrite import as_written, rewritten
from dcnr.protocol.messages import (
    CollectGarbage,
    Controlled,
    ControlSession,
    EventRecord,
    FollowSession,
    Garbage,
    ReadSession,
    SessionFiles,
    SessionInfo,
    Validated,
    ValidateSession,
)
from dcnr.session.checkpoint import Manifest
from dcnr.session.events import (
    LAST_KINDS,
    Failed,
    Finished,
    SessionEvent,
    StepDone,
    Stopped,
    Suspended,
    parse,
)
from dcnr.session.log import manifest_key, object_key
from dcnr.session.record import Record

if TYPE_CHECKING:
    from dcnr.client.connect import AsyncClient

LARGEST_EXPONENT = 700.0
"""Beyond it exp overflows; such a loss has no perplexity worth a name."""
_DTYPES = {"F32": "float32", "F64": "float64", "BF16": "bfloat16", "I64": "int64"}
"""Of the tensors of a state object."""
ENDED_STATES = frozenset({"finished", "failed", "stopped", "suspended"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """``perplexity`` = exp(loss), ``None`` where the loss is not one mean cross entropy in nats."""

    session: SessionId
    step: int
    loss: float
    rows: int
    perplexity: float | None


class AsyncRun:
    """One training session. Iterate it for its events."""

    def __init__(self, client: AsyncClient, session: SessionId) -> None:
        self._client = client
        self.id = session
        self.losses: dict[int, float] = {}
        """Loss per step, as far as this object has seen it."""

    def __aiter__(self) -> AsyncIterator[SessionEvent]:
        return self.events()

    async def info(self) -> SessionInfo:
        """Where the session stands."""
        found = await self._client.query(self.id)
        if not found:
            raise UnknownName(f"no session {self.id}")
        return found[0]

    async def events(self, after_step: int = 0) -> AsyncIterator[SessionEvent]:
        """Events until the session ends; ``StepDone`` from ``after_step`` + 1 on, each once, across lost connections.

        Ends after ``Finished``, ``Stopped`` or ``Suspended``. Raises :class:`SessionFailed` after ``Failed``, and
        :class:`Unavailable` where the network stays away for ``client_patience_s``.
        """
        seen = after_step
        limits = self._client.limits
        pause_s, away_s = limits.redial_first_s, 0.0
        while True:
            try:
                async for record in self._client.stream(FollowSession(session=self.id, after_step=seen), watched=True):
                    assert isinstance(record, EventRecord)
                    pause_s, away_s = limits.redial_first_s, 0.0
                    event = parse(record.kind, record.data)
                    if isinstance(event, StepDone):
                        if event.step <= seen:
                            continue
                        seen = event.step
                        self.losses[event.step] = event.loss
                    yield event
                    if isinstance(event, Failed):
                        raise SessionFailed(_failure(event))
                    if record.kind in LAST_KINDS:
                        return
                # The stream ended without a last word: the session had ended before we followed, or our peer went away.
                info = await self.info()
            except Unavailable:
                if away_s >= limits.client_patience_s:
                    raise
            else:
                if info.state in ENDED_STATES:
                    last = last_event(info)
                    yield last
                    if isinstance(last, Failed):
                        raise SessionFailed(_failure(last))
                    return
            await asyncio.sleep(pause_s)
            away_s += pause_s
            pause_s = min(2 * pause_s, limits.redial_most_s)

    async def stop(self) -> str:
        """End the session; it can be resumed from its newest commit. Returns its state."""
        return await self._control("stop")

    async def suspend(self) -> str:
        """Store the state after the next step, then end the session; it can be resumed from there. Returns its state, once
        it has ended."""
        state = await self._control("suspend")
        while state not in ENDED_STATES:
            # Said again, for an orchestrator that has taken over meanwhile does not know of it.
            await asyncio.sleep(self._client.limits.store_retry_s)
            state = (await self.info()).state
            if state not in ENDED_STATES:
                with contextlib.suppress(Refused):  # It has ended between the two.
                    await self._control("suspend")
        return state

    async def collect_garbage(self, delete: bool = False) -> tuple[str, ...]:
        """Keys of the session's objects in the store that no commit names: what abandoned checkpoints have left."""
        return (await self._client.expect(CollectGarbage(session=self.id, delete=delete), Garbage)).keys

    async def resume(self) -> str:
        """Go on from the newest commit. Returns the session's state."""
        return await self._control("resume")

    async def _control(self, action: str) -> str:
        return (await self._client.expect(ControlSession(session=self.id, action=action), Controlled)).state

    async def validate(self) -> Validation:
        """Loss of the newest commit over all rows that are held out (whole microbatches), computed by the network.

        Raises :class:`InvalidData` where none are held out, :class:`Unavailable` where there is no commit.
        """
        definition = from_canonical_json((await self.files()).definition)
        async for reply in self._client.stream(ValidateSession(session=self.id)):
            assert isinstance(reply, Validated)
            return Validation(
                session=self.id,
                step=reply.step,
                loss=reply.loss,
                rows=reply.rows,
                perplexity=exp(min(reply.loss, LARGEST_EXPONENT)) if _is_entropy(definition) else None,
            )
        raise ProtocolError("a validation ended without its result")

    async def files(self) -> SessionFiles:
        """Record, log, commits, and the tokens to read what they name."""
        return await self._client.expect(ReadSession(session=self.id), SessionFiles)

    async def manifest(self, files: SessionFiles, step: int | None = None) -> Manifest:
        """The manifest of the commit of ``step``, of the newest where it is ``None``. Raises :class:`NotFound`."""
        commits = [c for c in files.commits if step is None or c.step == step]
        if not commits:
            what = "no commit yet" if step is None else f"no commit of step {step}"
            raise NotFound(f"session {self.id} has {what}")
        commit = commits[-1]
        data = await self._client.data.get_dataset_object(manifest_key(files.session, commit.manifest), files.token)
        return Manifest.from_bytes(data, commit.manifest)

    async def initial(self, files: SessionFiles) -> Manifest | None:
        """The manifest of the weights that the session began with, ``None`` where they follow from its seed."""
        init = Record.from_bytes(files.record).init
        if init is None:
            return None
        key = manifest_key(files.session, init.manifest)
        return Manifest.from_bytes(await self._client.data.get_dataset_object(key, files.token), init.manifest)

    async def state_object(self, files: SessionFiles, manifest: Manifest, vnode: VNodeId) -> bytes:
        """A VNode's state object (safetensors). Raises :class:`CorruptObject` where it does not hash to its name."""
        key = object_key(files.session, manifest.states[vnode].sha256)
        return await self._client.data.get_dataset_object(key, files.token)

    async def state_dict(self, as_torch: bool = False) -> dict[str, Any]:
        """Weights of the newest commit, the file's ``<node id>.<name>`` to a numpy array (``as_torch``: a torch tensor).

        numpy has no bfloat16: such weights are float32 arrays of the same values. A torch tensor has the weight's own dtype.
        """
        files = await self.files()
        manifest = await self.manifest(files)
        weights: dict[str, Any] = {}
        for vnode in manifest.states:
            for key, array in _arrays(await self.state_object(files, manifest, vnode)).items():
                kind, _, name = key.partition(".")
                if kind == "param":
                    # A copy, because the loaded arrays are views into bytes that are neither aligned nor writable.
                    weights[f"{vnode}.{name}"] = array.copy()
        written = analyse(from_canonical_json(files.definition))
        run = rewritten(written, Record.from_bytes(files.record).rewrites)
        # Pieces of what was one tensor are copied, so that none keeps the others alive.
        weights = as_written(run, weights, lambda array, first, last: array[first:last].copy())
        if as_torch:
            import torch

            specs = ((vnode, spec) for vnode, info in written.vnodes.items() for spec in info.parameters)
            dtypes = {f"{vnode}.{spec.name}": getattr(torch, spec.dtype) for vnode, spec in specs}
            return {name: torch.from_numpy(array).to(dtypes[name]) for name, array in weights.items()}
        return weights

    def generate(
        self, prompt: str, max_tokens: int = 64, temperature: float = 0.8, top_p: float = 1.0, seed: int = 0
    ) -> AsyncIterator[str]:
        """Text from the session's newest commit, piece by piece."""
        return self._client.generate(self.id, prompt, max_tokens, temperature, top_p, seed)


def _arrays(data: bytes) -> dict[str, Any]:
    """The tensors of a state object as numpy arrays; what the library has for it knows no bfloat16."""
    from safetensors import deserialize

    from dcnr.runtime.tensors import as_array

    tensors = deserialize(data)  # type: ignore[no-untyped-call]
    return {key: as_array(found["data"], _DTYPES[found["dtype"]], found["shape"]) for key, found in tensors}


def _is_entropy(definition: Definition) -> bool:
    """Whether the loss is one mean cross entropy in nats and nothing else: smoothing and z-loss add to it."""
    if len(definition.costs) != 1 or definition.costs[0].weight != 1.0:
        return False
    (cost,) = (node for node in definition.nodes if node.id == definition.costs[0].node_id)
    entropy = cost.type == "tied_lm_head_ce" or cost.config.get("cost_function") in ("ce", "ce_logits")
    return entropy and not cost.config.get("label_smoothing") and not cost.config.get("z_loss")


def last_event(info: SessionInfo) -> SessionEvent:
    """The event with which a session in an ended state would have told its end."""
    match info.state:
        case "finished":
            return Finished(step=info.step, loss=info.loss)
        case "stopped":
            return Stopped(step=info.step)
        case "suspended":
            return Suspended(step=info.step, reason=info.reason)
        case "failed":
            return Failed(step=info.step, vnode="", reason=info.reason)
        case other:
            raise ProtocolError(f"session state {other!r} is no end")


def _failure(event: Failed) -> str:
    return f"session failed: {event.reason}"
