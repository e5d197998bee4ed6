"""Forward passes of explicit tensors through a real network, against the same weights in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import dcnr
from dcnr.cli.main import app
from dcnr.errors import InvalidData
from dcnr.runtime.supervisor import LocalNetwork
from dcnr.session.events import CheckpointCommitted, Finished, StepDone

ROWS = 4000
"""More than one batch holds: 576 bytes of inputs each."""


def branching() -> dcnr.Graph:
    """Two inputs, three outputs of different ranks, one of them in the middle."""
    g = dcnr.Graph("branching")
    tokens, features = g.input("tokens", [8], "int64"), g.input("features", [8, 16], "float32")
    hidden = g.embedder(tokens, vocab_size=32, dim=16, position_encoding="none", alias="tok")
    with g.colocate("block"):
        hidden = hidden + g.attention(g.layernorm(hidden), num_heads=2)
    joined = hidden + g.linear(features, out_dim=16)
    logits = g.linear(joined, tie="tok", bias=False)
    g.output("hidden", hidden)
    g.output("logits", logits)
    g.output("again", logits)
    g.cost("ce_logits", logits, target="targets")
    return g


def data(rows: int, length: int = 8) -> dict[str, np.ndarray[Any, Any]]:
    draw = np.random.default_rng(3)
    return {
        "tokens": draw.integers(0, 32, (rows, length)),
        "features": draw.standard_normal((rows, length, 16)).astype(np.float32),
        "targets": draw.integers(0, 32, (rows, length)),
    }


def alone(module: torch.nn.Module, inputs: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    with torch.no_grad():
        made = module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    return {name: tensor.numpy() for name, tensor in made.items()}


def test_outputs_are_those_of_one_process_while_training_goes_on(tmp_path: Path) -> None:
    graph, columns = branching(), data(64)
    inputs = {name: array for name, array in data(ROWS).items() if name != "targets"}
    # Too little memory for a whole batch of either kind: smaller ones are tried.
    with LocalNetwork(tmp_path / "network", 2, 1, memory_bytes=6 << 20) as local, dcnr.connect(local.address) as net:
        initial = net.forward(graph, inputs)
        assert initial.step == 0
        module = graph.to_torch()
        expected = alone(module, inputs)
        for name, array in initial.items():
            np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6)
        assert list(initial) == ["hidden", "logits", "again"]
        assert (initial["again"] == initial["logits"]).all()
        short = net.forward(graph, {name: array[:3, :5] for name, array in inputs.items()})
        np.testing.assert_allclose(short["logits"], initial["logits"][:3, :5], rtol=1e-4, atol=1e-5)

        run = net.train(graph, columns, steps=120, batch_size=4, microbatches=2, checkpoint_every=5)
        used, losses, commits = set(), {}, 0
        for event in run:
            if isinstance(event, StepDone):
                losses[event.step] = event.loss
            elif isinstance(event, CheckpointCommitted):
                commits += 1
                if commits % 8 == 1:
                    used.add(net.forward(run.id, inputs).step)
            elif isinstance(event, Finished):
                break
        # How many commits a run has depends on how fast the store is: one is in flight at a time.
        assert used
        assert all(step > 0 and step % 5 == 0 for step in used)
        trainer = dcnr.oracle.Trainer(graph, run_recipe(run), columns)
        assert [trainer.step().loss for _ in range(120)] == [losses[step] for step in range(1, 121)]

        final = net.forward(graph, inputs)
        assert final.step == 120
        module.load_state_dict(run.state_dict(as_torch=True))
        expected = alone(module, inputs)
        for name, array in final.items():
            np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)
        assert (final["logits"] != initial["logits"]).any()
        # A row is computed alike in any batch that it shares with as many others, and in batches of one row.
        one_by_one = [
            net.forward("branching", {n: a[i : i + 1] for n, a in inputs.items()})["logits"] for i in range(3)
        ]
        np.testing.assert_allclose(np.concatenate(one_by_one), final["logits"][:3], rtol=1e-4, atol=1e-5)

        through_files(tmp_path, local.address, inputs, final)
        with pytest.raises(InvalidData, match="input 'tokens': found float64"):
            net.forward(graph, {**inputs, "tokens": inputs["tokens"].astype(float)})


def run_recipe(run: Any) -> Any:
    from dcnr.session.record import Record

    return Record.from_bytes(run.files().record).recipe


def through_files(
    folder: Path, address: str, inputs: dict[str, np.ndarray[Any, Any]], final: dict[str, np.ndarray[Any, Any]]
) -> None:
    np.savez(folder / "in.npz", **inputs)  # type: ignore[arg-type]
    files = ["--input", str(folder / "in.npz"), "--output", str(folder / "out.npz"), "--network", address]
    done = CliRunner().invoke(app, ["forward", "branching", *files, "--json"])
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["step"] == 120
    assert told["shapes"]["logits"] == [ROWS, 8, 32]
    with np.load(folder / "out.npz") as found:
        assert {name: found[name].tobytes() for name in found.files} == {n: a.tobytes() for n, a in final.items()}
    plain = CliRunner().invoke(app, ["forward", "branching", *files])
    assert "step 120" in plain.stdout
