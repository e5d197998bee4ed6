"""``dcnr.AsyncClient``: everything a user can ask of a network. :mod:`dcnr.client.blocking` is its blocking twin."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import dcnr.errors
from dcnr.client.ports import Calls, DataCalls, DataSource, Prepared, Tokenizer, Toolkit
from dcnr.client.run import AsyncRun
from dcnr.config import LIMITS, Limits
from dcnr.errors import (
    DCNRError,
    InvalidData,
    NotFound,
    NotOwner,
    ProtocolError,
    Refused,
    UnknownName,
    Unreachable,
    UsageError,
)
from dcnr.ids import DatasetId, NetworkId, PeerId
from dcnr.network.analysis import analyse
from dcnr.network.graph import Definition, canonical_json, from_canonical_json, json_bytes
from dcnr.network.node_type import integer
from dcnr.protocol.messages import (
    CreateNetwork,
    CreateSession,
    Draining,
    DrainNode,
    EventRecord,
    FollowEvents,
    Generate,
    Generated,
    GetNetwork,
    GetStatus,
    ListNetworks,
    ListNodes,
    Message,
    NetworkCreated,
    NetworkDefinition,
    NetworkInfo,
    NetworkList,
    NodeInfo,
    NodeList,
    Refusal,
    SessionCreated,
    SessionInfo,
    SessionList,
    SessionQuery,
    Status,
)
from dcnr.session.dataset import Manifest, tokenizer_key
from dcnr.session.fit import context_of
from dcnr.session.recipe import Optimizer, Recipe, Schedule
from dcnr.session.record import Record

if TYPE_CHECKING:
    from dcnr.client.forward import Outputs


Reply = TypeVar("Reply", bound=Message)


class HasDefinition(Protocol):
    """A :class:`dcnr.Graph`."""

    def definition(self) -> Definition: ...


PREFIX_LEAST = 4
"""Characters of an id that may stand for it: fewer are a slip of the finger, or nothing at all."""

Model = HasDefinition | Definition | str | Path
"""A graph, a definition, a network file, or the name or id of a network that exists."""


class AsyncClient:
    """A client of one network. Use as an asynchronous context manager, or call :meth:`close`.

    ``address``: of an orchestrator, or of several that share a store, separated by commas. One is asked; where it does
    not answer the next one is, and where it does not own a session, the owner.
    """

    def __init__(self, address: str, toolkit: Toolkit, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self._addresses = [a for part in address.split(",") if (a := part.strip())] or [address]
        self._toolkit = toolkit
        self._connections: dict[str, tuple[Calls, DataCalls]] = {}
        """Also those that were turned away from: calls under way may still use them, and it may turn back."""
        self._tokenizers: dict[str, Tokenizer] = {}
        self._silent: dict[str, float] = {}
        """Addresses of orchestrators that hang, until when (of the loop's time) nobody is sent back to them."""
        self._open(self._addresses[0])

    def _open(self, address: str) -> None:
        self.address = address
        self._calls, self.data = self._connection(address)

    def _connection(self, address: str) -> tuple[Calls, DataCalls]:
        if address not in self._connections:
            self._connections[address] = self._toolkit.open_calls(address), self._toolkit.open_data(address)
        return self._connections[address]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        for calls, data in self._connections.values():
            await data.close()
            await calls.close()

    async def expect(self, message: Message, kind: type[Reply]) -> Reply:
        """A unary call whose answer must be of ``kind``. A :class:`Refusal` raises the error that it names."""
        tried: set[str] = set()
        while True:
            try:
                reply = await self._calls.call(message)
                if isinstance(reply, Refusal):
                    raise _refused(reply)
            except (Unreachable, NotOwner) as error:
                if not await self._turn(message, error, tried):
                    raise
                continue
            if not isinstance(reply, kind):
                raise ProtocolError(f"{type(message).__name__} was answered by {type(reply).__name__}")
            return reply

    async def _turn(self, message: Message, error: Unreachable | NotOwner, tried: set[str]) -> bool:
        """To another orchestrator, each once per call. False = there is none left to ask."""
        tried.add(self.address)
        if isinstance(error, NotOwner):
            await self._learn_owner(str(getattr(message, "session", "")))
        rest = [address for address in self._addresses if address not in tried]
        if isinstance(error, NotOwner):
            # The owner may be the one that hangs. Whoever named it will soon own the session itself.
            rest = [address for address in rest if not self._hangs(address)]
        if rest:
            self._open(rest[0])
        return bool(rest)

    def _hangs(self, address: str) -> bool:
        """Whether it has fallen silent a moment ago."""
        return self._silent.get(address, 0.0) > asyncio.get_running_loop().time()

    async def _learn_owner(self, session: str) -> None:
        """Ask whoever answered where the owner is, and ask there next."""
        reply = await self._calls.call(SessionQuery(session=session))
        if isinstance(reply, SessionList) and reply.sessions:
            new = reply.sessions[0].owner_addresses
            self._addresses = [*new, *(a for a in self._addresses if a not in new)]

    async def stream(self, message: Message, watched: bool = False) -> AsyncIterator[Message]:
        """A streaming call. A :class:`Refusal` raises the error that it names. ``watched``: whoever says nothing for half
        a lease is asked for a sign of life."""
        tried: set[str] = set()
        while True:
            begun = False
            try:
                async with (
                    aclosing(self._watched(message)) if watched else nullcontext(self._calls.stream(message)) as replies
                ):
                    async for reply in replies:
                        if isinstance(reply, Refusal):
                            raise _refused(reply)
                        begun = True
                        yield reply
            except (Unreachable, NotOwner) as error:
                # What has begun is for the caller to begin anew: it knows what it has seen. Where somebody hangs it
                # begins elsewhere.
                if begun and not self._hangs(self.address):
                    raise
                if not await self._turn(message, error, tried) or begun:
                    raise
            else:
                return

    async def _watched(self, message: Message) -> AsyncGenerator[Message]:
        """Raises :class:`Unreachable` a lease after the last sign of life: by then another orchestrator takes the session
        over. A process that hangs, and a machine that sleeps, close no connection."""
        address, calls, patience_s = self.address, self._calls, self.limits.lease_s / 2
        replies = calls.stream(message)
        while True:
            coming = asyncio.ensure_future(anext(replies, None))
            try:
                while not (await asyncio.wait({coming}, timeout=patience_s))[0]:
                    try:
                        async with asyncio.timeout(patience_s):
                            await calls.call(GetStatus())
                    except (TimeoutError, Unreachable) as error:
                        if not coming.done():
                            self._silent[address] = asyncio.get_running_loop().time() + self.limits.lease_s
                            raise Unreachable(f"the orchestrator at {address} has fallen silent") from error
            finally:
                if not coming.done():
                    coming.cancel()
                    await asyncio.wait({coming})
            reply = coming.result()
            if reply is None:
                return
            yield reply

    # --- what is there -------------------------------------------------------------------------------------

    async def nodes(self) -> tuple[NodeInfo, ...]:
        """The PNodes that the orchestrator knows, with what they host."""
        return (await self.expect(ListNodes(), NodeList)).nodes

    async def drain(self, peer: str, on: bool = True) -> PeerId:
        """A PNode, by peer or unique prefix of it, gives up what it hosts and takes nothing new until ``on`` is false."""
        return (await self.expect(DrainNode(peer=peer, on=on), Draining)).peer

    async def status(self) -> Status:
        return await self.expect(GetStatus(), Status)

    async def networks(self) -> tuple[NetworkInfo, ...]:
        return (await self.expect(ListNetworks(), NetworkList)).networks

    async def network(self, name: str) -> tuple[NetworkId, Definition]:
        """By id, unique prefix of it, or name."""
        reply = await self.expect(GetNetwork(network=name), NetworkDefinition)
        return reply.network, from_canonical_json(reply.definition)

    async def datasets(self) -> list[tuple[DatasetId, bytes]]:
        """Ids and manifests (JSON)."""
        return [(DatasetId(i), manifest) for i, manifest in await self.data.list_datasets()]

    async def sessions(self) -> tuple[SessionInfo, ...]:
        """All sessions, newest last."""
        return await self.query("")

    async def query(self, session: str) -> tuple[SessionInfo, ...]:
        """What is known of a session ('' = of all). Of one that another orchestrator runs, that one is asked, for the log
        tells no more than commits; where it does not answer, that is what there is."""
        found = (await self.expect(SessionQuery(session=session), SessionList)).sessions
        elsewhere = {i.owner_addresses[0] for i in found if i.owner_addresses and self.address not in i.owner_addresses}
        told: dict[str, SessionInfo] = {}
        for address in sorted(elsewhere):
            calls, _ = self._connection(address)
            with contextlib.suppress(DCNRError, TimeoutError):
                async with asyncio.timeout(self.limits.dial_timeout_s):
                    reply = await calls.call(SessionQuery(session=session))
                if isinstance(reply, SessionList):
                    told |= {i.session: i for i in reply.sessions if address in i.owner_addresses}
        return tuple(told.get(i.session, i) for i in found)

    async def session(self, name: str) -> AsyncRun:
        """A session by id or unique prefix of it. Raises :class:`UnknownName`."""
        if not name:  # A query for '' means all.
            raise UsageError("a session's id, or its beginning, is needed, found ''")
        reply = await self.expect(SessionQuery(session=name), SessionList)
        if not reply.sessions:
            raise UnknownName(f"no session {name!r}: `dcnr session list` shows all")
        return AsyncRun(self, reply.sessions[0].session)

    async def events(self, after: int = 0, follow: bool = False) -> AsyncIterator[EventRecord]:
        """What the network decided and noticed, from sequence number ``after`` + 1 on."""
        async for record in self.stream(FollowEvents(after=after, follow=follow)):
            assert isinstance(record, EventRecord)
            yield record

    # --- creating ------------------------------------------------------------------------------------------

    async def create_network(self, model: Model, precision: str = "") -> NetworkId:
        """The id of the network, which is created if it is not there. Raises :class:`InvalidNetwork`.

        ``precision`` instead of the model's own makes it another network; what a node, or ``param_precision``, has of its
        own stays.
        """
        definition: Definition
        match model:
            case Definition():
                definition = model
            case str() | Path():
                found = await asyncio.to_thread(self._read_file, Path(model))
                if found is None:
                    network, found = await self.network(str(model))
                    if not precision:
                        return network
                definition = found
            case _:
                definition = model.definition()
        if precision:
            definition = analyse(replace(definition, precision=precision)).definition
        return (await self.expect(CreateNetwork(definition=canonical_json(definition)), NetworkCreated)).network

    def _read_file(self, path: Path) -> Definition | None:
        """``None`` where there is no such file and the path may be the name of a network."""
        if path.is_file():
            return self._toolkit.load_network(path)
        if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
            raise UsageError(f"no network file {path}")
        return None

    async def add_data(
        self,
        source: DataSource,
        *,
        name: str = "",
        tokenizer: str = "bpe:4096",
        split: float | None = None,
        invalid_utf8: str = "refuse",
        dtypes: Mapping[str, str] | None = None,
    ) -> DatasetId:
        """Tokenize, cut and upload; the id of the dataset.

        ``source``: text files, or npz, npy, csv and parquet files (paths, folders, globs), or a dict of arrays of shape
        [rows, ...]. ``split`` is the share of validation; ``None`` = 0.05 of what files hold, nothing of given arrays.
        ``invalid_utf8``: ``refuse`` text that is no UTF-8, or ``replace`` what is none by U+FFFD. ``dtypes``: columns of
        files to float32, float64 or int64.
        """
        prepared = await asyncio.to_thread(self._toolkit.prepare, source, tokenizer, name, split, invalid_utf8, dtypes)
        return await self._upload(prepared)

    async def _upload(self, prepared: Prepared) -> DatasetId:
        for key, data in prepared.objects.items():
            await self.data.put_dataset_object(key, data)
        return DatasetId(await self.data.create_dataset(prepared.manifest))

    async def dataset(self, name: str) -> tuple[DatasetId, bytes]:
        """By id, unique prefix of it, or name (the newest of that name): id and manifest. Raises :class:`UnknownName`."""
        _check_text("the dataset's name", name)
        try:
            dataset, manifest = await self.data.get_dataset(name)
        except NotFound as error:
            raise UnknownName(str(error)) from error
        return DatasetId(dataset), manifest

    async def delete_data(self, name: str) -> DatasetId:
        """Delete a dataset, named as in :meth:`dataset`.

        Raises :class:`UnknownName`, and :class:`Refused` while an unfinished session uses it.
        """
        _check_text("the dataset's name", name)
        try:
            return DatasetId(await self.data.delete_dataset(name))
        except NotFound as error:
            raise UnknownName(str(error)) from error

    async def _dataset_for(
        self, source: DataSource, tokenizer: str | None, network: NetworkId, recipe: Recipe
    ) -> DatasetId:
        """An existing dataset, or a new one that is uploaded only if it fits: a refusal leaves nothing behind."""
        if not isinstance(source, str) or is_files(source):
            definition = (await self.network(network))[1]
            chosen = tokenizer or f"bpe:{_vocabulary(definition)}"
            prepared = await asyncio.to_thread(self._toolkit.prepare, source, chosen, "", None, "refuse", None)
            manifest = Manifest.from_bytes(prepared.manifest)
            if tokenizer is not None and manifest.tokenizer is None:
                raise UsageError("these data are columns, which have no tokenizer: leave --tokenizer out")
            if definition.costs:
                context_of(analyse(definition), manifest, recipe)
            return await self._upload(prepared)
        if tokenizer is not None:
            raise UsageError(f"{source!r} is a dataset that exists and has its tokenizer: leave --tokenizer out")
        try:
            return (await self.dataset(source))[0]
        except UnknownName:
            raise UnknownName(f"{source!r} is neither a file, nor a glob that matches one, nor a dataset") from None

    async def train(
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
    ) -> AsyncRun:
        """Create what is missing (network, dataset), then a session, which starts at once.

        ``init_from``: ``SESSION[@STEP]``, a commit of another session whose weights this one begins with; its optimizer
        starts anew. ``tokenizer`` of text that is added: ``None`` = byte-level BPE of the network's own vocabulary.
        ``precision``: see :meth:`create_network`.

        Raises :class:`UsageError` for a recipe that cannot be, :class:`InvalidNetwork`, :class:`InvalidData`.
        """
        recipe = Recipe(
            steps=steps,
            batch_size=batch_size,
            microbatches=microbatches,
            seed=seed,
            optimizer=optimizer or Optimizer(),
            schedule=schedule or Schedule(),
            clip_norm=clip_norm,
            clip_scope=clip_scope,
            checkpoint_every=checkpoint_every,
            eval_every=eval_every,
            eval_batches=eval_batches,
        )
        network = await self.create_network(model, precision)
        dataset = await self._dataset_for(data, tokenizer, network, recipe)
        return await self.create_session(network, dataset, recipe, init_from)

    async def create_session(
        self, network: NetworkId, dataset: DatasetId, recipe: Recipe, init_from: str = ""
    ) -> AsyncRun:
        """``init_from``: ``SESSION[@STEP]``, the commit whose weights the new session begins with."""
        request = CreateSession(
            network=network,
            dataset=dataset,
            recipe=json_bytes(recipe.to_json()),
            nonce=secrets.token_hex(16),
            init_from=init_from,
        )
        return AsyncRun(self, (await self.expect(request, SessionCreated)).session)

    # --- forward --------------------------------------------------------------------------------------------

    async def forward(self, model: Model, inputs: Mapping[str, Any]) -> Outputs:
        """Every declared output of a network for explicit tensors: input name to array [rows, ...] in, the same out.

        ``model`` may also be a session. The weights are those of the newest commit of the session, or of the network's
        newest session with one; initial weights where there is none. Rows go in batches, sequences may be shorter than
        declared. Raises :class:`InvalidData` with everything that does not fit.
        """
        from dcnr.client import forward

        target, definition = await self._whose_weights(model)
        return await forward.run(self, target, forward.check(definition, inputs, self.limits))

    async def _whose_weights(self, model: Model) -> tuple[str, Definition]:
        """A session or network, and its definition; the network is created if it is not there."""
        if isinstance(model, str) and not await asyncio.to_thread(Path(model).is_file):
            found = [s for s in await self.sessions() if len(model) >= PREFIX_LEAST and s.session.startswith(model)]
            if len(found) == 1:
                return found[0].session, (await self.network(found[0].network))[1]
        network = await self.create_network(model)
        return network, (await self.network(network))[1]

    # --- text ----------------------------------------------------------------------------------------------

    async def generate(
        self,
        target: str,
        prompt: str,
        max_tokens: int = 64,
        temperature: float = 0.8,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> AsyncIterator[str]:
        """Text after ``prompt``, piece by piece, from a session's newest commit; the prompt is not repeated.

        ``target`` is a session, or a network (then its newest session with a commit), by id, prefix or name.
        """
        info = await self.newest_commit(target)
        async for piece in self.generate_from(info, prompt, max_tokens, temperature, top_p, seed):
            yield piece

    async def generate_from(
        self, info: SessionInfo, prompt: str, max_tokens: int, temperature: float, top_p: float, seed: int
    ) -> AsyncIterator[str]:
        """As :meth:`generate`, for a session that is already found."""
        _check_text("the prompt", prompt)
        tokenizer = await self.tokenizer(info)
        tokens = tokenizer.encode(prompt)
        if not tokens:
            raise UsageError("the prompt is empty")
        request = Generate(
            target=info.session,
            prompt=tuple(tokens),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        text = tokenizer.stream()
        async for reply in self.stream(request):
            assert isinstance(reply, Generated)
            # The first record names the session and step; it carries no token.
            if reply.token >= 0 and (piece := text.push(reply.token)):
                yield piece
        if rest := text.finish():
            yield rest

    async def newest_commit(self, target: str) -> SessionInfo:
        """The session that :meth:`generate` reads: ``target`` itself, or the newest one with a commit of that network.

        Raises :class:`UnknownName`, :class:`NotFound` without a commit, :class:`UsageError` for an ambiguous beginning.
        """
        mine = _meant(target, await self.sessions())
        committed = [s for s in mine if s.committed_step > 0]
        if not mine:
            raise UnknownName(f"no session and no trained network {target!r}: `dcnr session list` shows all")
        if not committed:
            raise NotFound(f"{target!r} has no commit yet: text comes from committed checkpoints only")
        return committed[-1]

    async def tokenizer(self, info: SessionInfo) -> Tokenizer:
        """The tokenizer of a session's text. Raises :class:`InvalidData` for a session on columns, which has none."""
        sha256 = Record.from_bytes(info.record).tokenizer
        if not sha256:
            raise InvalidData(f"session {info.session} was trained on columns, not on text: it has no tokenizer")
        if sha256 not in self._tokenizers:
            data = await self.data.get_dataset_object(tokenizer_key(sha256))
            self._tokenizers[sha256] = self._toolkit.load_tokenizer(data)
        return self._tokenizers[sha256]


def is_files(source: str) -> bool:
    """Whether ``source`` names files: an existing path, or a glob (even one that matches nothing)."""
    return Path(os.path.expanduser(source)).exists() or glob.has_magic(source)


def _check_text(what: str, given: str) -> None:
    """Raises :class:`UsageError` for bytes of a command line that are no UTF-8, which Python keeps in a string."""
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} {given!r}: found no UTF-8 at character {error.start + 1}, expected text") from error


def _meant(target: str, sessions: Sequence[SessionInfo]) -> list[SessionInfo]:
    """The session, or those of the network, with that id or name, else with an id that begins so.

    Raises :class:`UsageError` for a beginning of several. Empty where there is none."""
    whole = [s for s in sessions if s.session == target] or [
        s for s in sessions if target in (s.network, s.network_name)
    ]
    if whole or len(target) < PREFIX_LEAST:
        return whole
    begun = {name for s in sessions for name in (s.session, s.network) if name.startswith(target)}
    if len(begun) > 1:
        found = ", ".join(sorted(name[:16] for name in begun))
        raise UsageError(f"{target!r} is the beginning of several ids: {found}")
    return [s for s in sessions if s.session in begun or s.network in begun]


def _refused(refusal: Refusal) -> DCNRError:
    """The error of the tree that a refusal names; :class:`Refused` where this version has no such class."""
    kind = getattr(dcnr.errors, refusal.kind, None)
    if isinstance(kind, type) and issubclass(kind, dcnr.errors.InvalidNetwork):
        return kind(refusal.reason.split("\n"))
    if isinstance(kind, type) and issubclass(kind, DCNRError):
        return kind(refusal.reason)
    return Refused(refusal.reason)


def _vocabulary(definition: Definition) -> int:
    """Tokens that the network's embedder knows; the default tokenizer's size where there is none."""
    sizes = [integer(node.config, "vocab_size") for node in definition.nodes if node.type == "embedder"]
    return sizes[0] if sizes else 4096
