"""A client wants a session: is everything there that it needs, and could the PNodes hold it? Then it exists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from dcnr.errors import (
    CorruptObject,
    DCNRError,
    InvalidNetwork,
    NotInThisVersion,
    ProtocolError,
    StoreUnavailable,
    UnknownName,
    UsageError,
)
from dcnr.ids import DatasetId
from dcnr.network.analysis import Network
from dcnr.network.rewrite import TRAINING, rewritten
from dcnr.network.types import catalogue_digest
from dcnr.orchestrator.desk import Desk
from dcnr.orchestrator.placement import Placement
from dcnr.orchestrator.sessions import Sessions
from dcnr.orchestrator.targets import Targets, load_targets, valid_targets_per_row
from dcnr.protocol import messages as m
from dcnr.session import dataset
from dcnr.session.checkpoint import Manifest
from dcnr.session.fit import context_of, same_weights
from dcnr.session.log import Fold, manifest_key, object_key, record_key
from dcnr.session.recipe import Recipe
from dcnr.session.record import Record, Source


class Creation:
    """See the module's docstring."""

    def __init__(self, desk: Desk, sessions: Sessions) -> None:
        self._desk = desk
        self._sessions = sessions

    def create(self, request: int, message: m.CreateSession) -> None:
        network = self._sessions.networks.get(message.network)
        if network is None:
            raise UnknownName(f"no network {message.network!r}: create it first")
        recipe = Recipe.from_bytes(message.recipe)
        if recipe.mode != "exact" or recipe.delay != 0:
            raise NotInThisVersion(f"mode {recipe.mode!r} with delay {recipe.delay} is not in this version")
        if not network.definition.costs:
            raise InvalidNetwork([f"network {network.definition.name!r} has no cost: a training session needs one"])
        for existing in self._sessions.owners.values():
            if existing.record.nonce == message.nonce:
                self._desk.respond(request, m.SessionCreated(session=existing.id))
                return

        def got_manifest(data: bytes | None) -> None:
            try:
                if data is None:
                    raise UnknownName(f"no dataset {message.dataset}: add it first with `dcnr data add`")
                described = dataset.Manifest.from_bytes(data)
                if described.id != message.dataset:
                    raise CorruptObject(f"{dataset.manifest_key(message.dataset)} is damaged: add the data again")
                record = self._record(run, described, recipe, message)
            except DCNRError as error:
                self._desk.respond(request, m.Refusal(kind=type(error).__name__, reason=str(error)))
                return
            if source is not None:
                record = replace(record, init=source)
            load_targets(
                self._desk,
                network,
                record,
                lambda targets: self._admit(request, network, run, record, targets),
                lambda reason: self._desk.respond(request, m.Refusal(kind="InvalidData", reason=reason)),
            )

        run = rewritten(network, TRAINING)
        source = self._source(message.init_from, run) if message.init_from else None
        self._desk.get(dataset.manifest_key(message.dataset), got_manifest)

    def _source(self, name: str, network: Network) -> Source:
        """The commit that ``SESSION[@STEP]`` names. Raises :class:`UsageError`, or :class:`InvalidNetwork` with every
        parameter that is not alike."""
        session, at, step = name.partition("@")
        if at and not step.isdecimal():
            raise UsageError(f"found {name!r}; expected SESSION or SESSION@STEP, as in 4f2a90c1@200")
        owner = self._sessions.find(session)
        commits = {commit.step: commit for commit in owner.fold.commits}
        if not commits:
            raise UsageError(f"session {owner.id} has no commit yet: there is nothing to begin with")
        commit = commits.get(int(step)) if at else owner.fold.newest()
        if commit is None:
            known = ", ".join(map(str, commits))
            raise UsageError(f"session {owner.id} has no commit of step {step}; it has those of {known}")
        same_weights(network, owner.network)
        assert commit.manifest is not None
        return Source(session=owner.id, step=commit.step, manifest=commit.manifest)

    def _copy_source(self, record: Record, then: Callable[[str], None]) -> None:
        """What the session begins with becomes its own, so that the source may train on, drop it or be deleted.
        ``then`` gets '' or what could not be read."""
        source = record.init
        if source is None:
            then("")
            return

        def got_manifest(data: bytes | None) -> None:
            try:
                manifest = Manifest.from_bytes(data or b"", source.manifest)
            except ProtocolError as error:
                then(f"{manifest_key(source.session, source.manifest)}: {error}")
                return
            shas = dict.fromkeys(state.sha256 for state in manifest.states.values())
            pairs = tuple((object_key(source.session, sha256), object_key(record.id, sha256)) for sha256 in shas)
            key = manifest_key(record.id, source.manifest)
            self._desk.copy(pairs, lambda damaged: copied(damaged, key, manifest))

        def copied(damaged: Mapping[str, str], key: str, manifest: Manifest) -> None:
            if damaged:
                first, reason = next(iter(sorted(damaged.items())))
                then(f"{first}: {reason}")
            else:
                self._desk.create(key, manifest.to_bytes(), lambda found: then(""))

        self._desk.get(manifest_key(source.session, source.manifest), got_manifest)

    def _record(self, run: Network, manifest: dataset.Manifest, recipe: Recipe, message: m.CreateSession) -> Record:
        """Check the dataset against the network as it is trained, and fix everything that can reach a bit."""
        context = context_of(run, manifest, recipe)
        return Record(
            network=run.id,
            network_name=run.definition.name,
            dataset=DatasetId(manifest.id),
            tokenizer=manifest.tokenizer.sha256 if manifest.tokenizer else "",
            context=context,
            rows_train=manifest.rows("train", context),
            rows_validation=manifest.rows("validation", context),
            valid_targets_per_row=valid_targets_per_row(run, manifest, context),
            recipe=recipe,
            groups=tuple(tuple(str(v) for v in g.vnodes) for g in run.groups),
            catalogue=catalogue_digest(),
            created_unix_s=self._desk.unix_s(),
            nonce=message.nonce,
            rewrites=run.rewrites,
        )

    def _admit(self, request: int, network: Network, run: Network, record: Record, targets: Targets) -> None:
        """``run``: ``network`` as it is trained. Could all PNodes together hold it, were they free? Then the session exists, and waits if they are not."""
        desk = self._desk
        problem = desk.problem(run, record, lambda peer, node: node.capabilities.memory_bytes)

        def planned(answer: Placement | str) -> None:
            if isinstance(answer, str):
                desk.respond(request, m.Refusal(kind="NoCapacity", reason=answer))
                return
            self._copy_source(record, copied)

        def copied(unreadable: str) -> None:
            if unreadable:
                reason = f"the commit to begin with cannot be read, it may have been dropped meanwhile: {unreadable}"
                desk.respond(request, m.Refusal(kind="Unavailable", reason=reason))
                return
            desk.create(record_key(record.id), record.to_bytes(), created, late)

        def late(reason: str) -> None:
            reason = f"session {record.id} begins as soon as the store takes its record: {reason}"
            desk.respond(request, m.Refusal(kind=StoreUnavailable.__name__, reason=reason))

        def created(found: bytes | None) -> None:
            answer = m.SessionCreated(session=record.id)
            if record.id in self._sessions.owners:
                desk.respond(request, answer)
            elif found is None or found == record.to_bytes():
                owner = self._sessions.add(record.id, record, network, Fold(), targets)
                desk.emit("session_created", record.id, {"network": record.network_name, "steps": record.recipe.steps})
                owner.acquire()
                desk.respond(request, answer)
            else:
                # The same request has reached another orchestrator before.
                self._sessions.read(record.id, lambda: desk.respond(request, answer))

        desk.plan(problem, planned)
