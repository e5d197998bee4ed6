"""The promise: weights, optimizer state and losses of a distributed run equal those of one process, bit for bit."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

import dcnr
from dcnr.cli.verify import collect, recompute
from dcnr.client.blocking import Client, Run
from dcnr.ids import VNodeId
from dcnr.network.analysis import METRICS
from dcnr.network.graph import MetricSpec
from dcnr.oracle import Trainer
from dcnr.runtime.supervisor import LocalNetwork
from dcnr.session.events import CheckpointCommitted, PNodeLost, RecoveryPhase, SessionEvent, StepDone
from dcnr.session.recipe import Optimizer, Recipe, Schedule
from dcnr.session.record import Record

STEPS = 20
LONG = 80
"""Steps of the runs that something happens to: they must still be under way when it does."""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNetwork]:
    """One network that the tests below let grow, and mend after what they did to it."""
    with LocalNetwork(tmp_path_factory.mktemp("network"), 1, 1) as network:
        yield network


@pytest.fixture
def client(local: LocalNetwork) -> Iterator[Client]:
    with dcnr.connect(local.address) as connected:
        yield connected


def ensure_pnodes(local: LocalNetwork, count: int) -> None:
    for number in range(count):
        if number >= len(local.pnodes):
            local.start_pnode()
        elif not local.pnodes[number].running:
            local.start_pnode(number)


def text_like_columns(rows: int = 200, context: int = 16, vocabulary: int = 64) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, vocabulary, size=(rows, context + 1))
    return {"tokens": tokens[:, :-1].astype(np.int64), "targets": tokens[:, 1:].astype(np.int64)}


def small_gpt() -> dcnr.Graph:
    """Tied, with dropout: everything whose order could show in the bits."""
    return dcnr.templates.gpt(layers=4, dim=64, heads=2, vocab=64, context=16, dropout=0.1)


def bf16_gpt(param_precision: str) -> dcnr.Graph:
    """A network of bfloat16 with one node of its own precision."""
    built = dcnr.templates.gpt(layers=4, dim=64, heads=2, vocab=64, context=16, dropout=0.1, precision="bf16")
    definition = replace(built.definition(), param_precision=param_precision)
    own = {"param_precision": "float32", "activation_precision": "float32"}
    nodes = (replace(n, config={**n.config, **own}) if n.id == "block_3_linear" else n for n in definition.nodes)
    return dcnr.Graph.from_definition(replace(definition, nodes=tuple(nodes)))


def train(
    client: Client,
    columns: dict[str, np.ndarray],
    steps: int,
    optimizer: Optimizer | None = None,
    schedule: Schedule | None = None,
    clip_scope: str = "network",
    model: dcnr.Graph | None = None,
) -> Run:
    return client.train(
        model or small_gpt(),
        data=columns,
        steps=steps,
        batch_size=8,
        microbatches=4,
        optimizer=optimizer or dcnr.AdamW(lr=1e-2),
        schedule=schedule or dcnr.Cosine(warmup=3),
        clip_norm=0.5,
        clip_scope=clip_scope,
        checkpoint_every=5,
        seed=7,
    )


def assert_equals_oracle(run: Run, columns: dict[str, np.ndarray], steps: int, model: dcnr.Graph | None = None) -> None:
    """Every loss, and the state object (weights and optimizer) of every VNode."""
    files = run.files()
    manifest = run.manifest(files)
    assert manifest.step == steps
    oracle = Trainer(model or small_gpt(), Record.from_bytes(files.record).recipe, columns)
    losses = {result.step: result.loss for result in (oracle.step() for _ in range(steps))}
    assert run.losses == losses
    hashes = {vnode: hashlib.sha256(data).hexdigest() for vnode, data in oracle.state_objects().items()}
    assert {vnode: state.sha256 for vnode, state in manifest.states.items()} == hashes


@pytest.mark.parametrize("pnodes", [1, 2, 3])
def test_any_number_of_pnodes_computes_the_same_bits(local: LocalNetwork, client: Client, pnodes: int) -> None:
    ensure_pnodes(local, pnodes)
    columns = text_like_columns()
    run = train(client, columns, STEPS)
    events = list(run)
    assert [event.step for event in events if isinstance(event, StepDone)] == list(range(1, STEPS + 1))
    # Not from the event ``Placed``: a client that begins to follow a moment later has missed it.
    assert len({place.peer for place in run.info().placement}) == pnodes
    assert_equals_oracle(run, columns, STEPS)
    # Clipped by VNode nobody waits for the norm of all; the network grows, so this comes before the next number.
    run = train(client, columns, STEPS, dcnr.SGD(lr=0.1, momentum=0.9), dcnr.WSD(warmup=3, min_lr=1e-3), "vnode")
    assert len(list(run)) > STEPS
    assert len({place.peer for place in run.info().placement}) == pnodes
    assert_equals_oracle(run, columns, STEPS)
    # Weights of bfloat16 in the one, of float32 in the other, with a node of its own precision.
    for param_precision in ("", "float32"):
        model = bf16_gpt(param_precision)
        run = train(client, columns, STEPS, model=model)
        assert len(list(run)) > STEPS
        assert len({place.peer for place in run.info().placement}) == pnodes
        assert_equals_oracle(run, columns, STEPS, model)


def test_bf16_at_the_users_border_is_float32(local: LocalNetwork, client: Client) -> None:
    """Outputs and weights of a network of bfloat16, as arrays and as tensors, and the module that takes them."""
    ensure_pnodes(local, 2)
    columns, model = text_like_columns(), bf16_gpt("")
    run = train(client, columns, 5, model=model)
    list(run)
    arrays, tensors = run.state_dict(), run.state_dict(as_torch=True)
    assert {array.dtype.name for array in arrays.values()} == {"float32"}
    assert {name for name, t in tensors.items() if t.dtype == torch.float32} == {
        "block_3_linear.weight",
        "block_3_linear.bias",
    }
    oracle = Trainer(model, Record.from_bytes(run.files().record).recipe, columns)
    oracle.run(5)
    for name, array in oracle.state_dict().items():
        assert (array == arrays[name]).all()
        assert (tensors[name].float().numpy() == array).all()
    outputs = client.forward(run.id, {"tokens": columns["tokens"][:4]})
    assert outputs.step == 5
    assert outputs["logits"].dtype == np.float32
    # They were bfloat16: the lower half of every float32 is empty.
    assert not (outputs["logits"].view(np.uint32) & 0xFFFF).any()
    module = model.to_torch().eval()
    module.load_state_dict(tensors)
    with torch.no_grad():
        alone = module(tokens=torch.from_numpy(columns["tokens"][:4]))
    assert alone.dtype == torch.bfloat16
    np.testing.assert_allclose(outputs["logits"], alone.float().numpy(), atol=0.05)


def test_metrics_of_the_network_are_the_oracles(local: LocalNetwork, client: Client) -> None:
    """Every type, on both PNodes, at nodes with parameters and without; clipped by network and by VNode."""
    ensure_pnodes(local, 2)
    columns = text_like_columns()
    metrics = tuple(
        MetricSpec(name=f"{type} of {node}", type=type, node_id=VNodeId(node))
        for type in METRICS
        for node in ("embedder", "block_0_linear", "block_3_attention", "final_layernorm")
    )
    rms = (
        MetricSpec(name=f"rms of {node}", type="activation_rms", node_id=VNodeId(node))
        for node in ("block_0_gelu", "block_1_dropout", "block_3_add_2", "head")
    )
    definition = replace(small_gpt().definition(), metrics=(*metrics, *rms))
    for clip_scope in ("network", "vnode"):
        run = client.train(
            definition, data=columns, steps=6, batch_size=8, microbatches=4, clip_norm=0.5, clip_scope=clip_scope
        )
        found = {event.step: event.metrics for event in run if isinstance(event, StepDone)}
        placed = {place.vnode: place.peer for place in run.info().placement}
        assert placed[VNodeId("embedder")] != placed[VNodeId("block_3_attention")]
        oracle = Trainer(definition, Record.from_bytes(run.files().record).recipe, columns)
        results = oracle.run(6)
        assert found == {result.step: result.metrics for result in results}
        assert all(values.keys() == {metric.name for metric in definition.metrics} for values in found.values())


def weights_of(run: Run, step: int) -> dict[VNodeId, bytes]:
    files = run.files()
    manifest = run.manifest(files, step)
    return {vnode: run.state_object(files, manifest, vnode) for vnode in manifest.states}


def test_a_fork_begins_with_the_weights_of_a_commit(local: LocalNetwork, client: Client) -> None:
    """Another optimizer and seed; a PNode is killed before any commit; then stopped, resumed, verified."""
    ensure_pnodes(local, 3)
    columns = text_like_columns()
    source = train(client, columns, STEPS)
    list(source)
    step = source.files().commits[-2].step
    weights = weights_of(source, step)
    recipe = Recipe(
        steps=LONG, batch_size=8, microbatches=2, seed=3, optimizer=dcnr.SGD(lr=0.05, momentum=0.9), checkpoint_every=40
    )
    run = client.train(
        small_gpt(),
        data=columns,
        steps=LONG,
        batch_size=8,
        microbatches=2,
        seed=3,
        optimizer=recipe.optimizer,
        checkpoint_every=40,
        init_from=f"{source.id[:8]}@{step}",
    )
    lost = 0
    for event in run:
        if isinstance(event, StepDone) and event.step == 3:
            local.kill(2)
        if isinstance(event, PNodeLost):
            lost += 1
        if isinstance(event, CheckpointCommitted):
            run.stop()
    assert lost == 1
    run.resume()
    list(run)
    record = Record.from_bytes(run.files().record)
    assert record.recipe == recipe
    assert record.init is not None
    (commit,) = [c for c in source.files().commits if c.step == step]
    assert (record.init.session, record.init.step, record.init.manifest) == (source.id, step, commit.manifest)
    oracle = Trainer(small_gpt(), recipe, columns)
    oracle.load_weights(weights)
    losses = {result.step: result.loss for result in oracle.run(LONG)}
    assert run.losses == losses
    hashes = {vnode: hashlib.sha256(data).hexdigest() for vnode, data in oracle.state_objects().items()}
    assert {vnode: state.sha256 for vnode, state in run.manifest(run.files()).states.items()} == hashes
    # The source may go: what the fork began with was copied.
    for folder in ("objects", "manifests"):
        shutil.rmtree(local.home / "store" / "sessions" / source.id / folder)
    assert recompute(client.address, collect(client, run)).equal


def test_a_fork_of_another_network_names_every_difference(local: LocalNetwork, client: Client) -> None:
    ensure_pnodes(local, 1)
    columns = text_like_columns()
    source = client.train(small_gpt(), data=columns, steps=1, batch_size=8)
    list(source)
    other = dcnr.templates.gpt(layers=3, dim=64, heads=2, vocab=64, context=16, dropout=0.1)
    with pytest.raises(dcnr.errors.InvalidNetwork) as refused:
        client.train(other, data=columns, steps=1, batch_size=8, init_from=source.id)
    (found,) = client.sessions()[-1:]
    assert found.session == source.id, "nothing was created"
    assert len(refused.value.problems) > 5
    assert all("the network has no such parameter" in problem for problem in refused.value.problems)
    for name, said in ((f"{source.id}@7", "no commit of step 7; it has those of 1"), ("zz@1", "no session 'zz'")):
        with pytest.raises(dcnr.DCNRError, match=said):
            client.train(small_gpt(), data=columns, steps=1, batch_size=8, init_from=name)


def test_muon_computes_the_same_bits(local: LocalNetwork, client: Client) -> None:
    ensure_pnodes(local, 2)
    columns = text_like_columns()
    run = train(client, columns, STEPS, dcnr.Muon(lr=1e-2, weight_decay=0.1))
    assert len(list(run)) > STEPS
    assert_equals_oracle(run, columns, STEPS)


def test_a_killed_pnode_changes_no_bit(local: LocalNetwork, client: Client) -> None:
    ensure_pnodes(local, 3)
    columns = text_like_columns()
    run = train(client, columns, LONG)
    seen: list[SessionEvent] = []
    for event in run:
        seen.append(event)
        if isinstance(event, StepDone) and event.step == 7:
            local.kill(1)
    assert [e.step for e in seen if isinstance(e, StepDone)] == list(range(1, LONG + 1))
    assert [type(e) for e in seen].count(PNodeLost) == 1
    phases = [e.phase for e in seen if isinstance(e, RecoveryPhase)]
    assert phases == ["detected", "decided", "logged", "ticketed", "loaded", "regained"]
    assert_equals_oracle(run, columns, LONG)


def test_a_killed_orchestrator_changes_no_bit(local: LocalNetwork, client: Client) -> None:
    """Started again, it acquires the session, rolls back to the newest commit and goes on; clients come back."""
    ensure_pnodes(local, 2)
    columns = text_like_columns()
    run = train(client, columns, LONG)
    steps: list[int] = []
    for event in run:
        if isinstance(event, StepDone):
            steps.append(event.step)
            if event.step == 12:
                local.kill_orchestrator()
                local.start_orchestrator()
    assert steps == list(range(1, LONG + 1))
    assert_equals_oracle(run, columns, LONG)
