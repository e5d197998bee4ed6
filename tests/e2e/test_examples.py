"""Every example, on one, two and three real PNodes: the bits are those of one process, and the pictures are told apart."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dcnr
from dcnr.oracle import Trainer
from dcnr.runtime.supervisor import LocalNetwork
from dcnr.session.recipe import Recipe
from dcnr.session.record import Record

EXAMPLES = Path(__file__).parents[2] / "examples"
Columns = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNetwork]:
    with LocalNetwork(tmp_path_factory.mktemp("network"), 1, 1) as network:
        yield network


def tokens(vocabulary: int, context: int, rows: int = 40) -> Columns:
    drawn = np.random.default_rng(0).integers(0, vocabulary, (rows, context + 1))
    return {"tokens": drawn[:, :-1].copy(), "targets": drawn[:, 1:].copy()}


def floats(rows: int = 200, **columns: tuple[int, ...] | int) -> Columns:
    """Normal values of a shape, or classes below a number."""
    random = np.random.default_rng(0)
    return {
        name: random.integers(0, shape, rows)
        if isinstance(shape, int)
        else random.normal(size=(rows, *shape)).astype("float32")
        for name, shape in columns.items()
    }


# The published ones are large: fewer steps of fewer rows, on two PNodes. Longer runs of them are measured by hand.
CASES: dict[str, tuple[Columns, Recipe, tuple[int, ...]]] = {
    "digits": (floats(x=(64,), y=10), Recipe(steps=20, batch_size=16, microbatches=4), (1, 2, 3)),
    "mlp": (floats(x=(4,), y=(1,)), Recipe(steps=20, batch_size=16, microbatches=4), (1, 2, 3)),
    "branching": (
        floats(x=(8,), y=(4,), label=5),
        Recipe(steps=20, batch_size=8, microbatches=2, optimizer=dcnr.AdamW(lr=1e-2)),
        (1, 2, 3),
    ),
    "llama": (
        tokens(1024, 64),
        Recipe(steps=20, batch_size=4, microbatches=2, optimizer=dcnr.Muon(lr=1e-2)),
        (1, 2, 3),
    ),
    "gpt-demo": (tokens(1024, 128), Recipe(steps=20, batch_size=2, microbatches=2), (1, 2, 3)),
    "published-small": (tokens(10_000, 128), Recipe(steps=3, batch_size=2, microbatches=2), (2,)),
}


@pytest.mark.parametrize("name", CASES)
def test_an_example_has_the_bits_of_one_process(local: LocalNetwork, name: str) -> None:
    columns, recipe, counts = CASES[name]
    model = dcnr.load(EXAMPLES / f"{name}.yaml")
    expected: tuple[dict[int, float], dict[str, str]] | None = None
    for count in counts:
        while len(local.pnodes) < count:
            local.start_pnode()
        with dcnr.connect(local.address) as client:
            while sum(node.colour == "green" for node in client.nodes()) < count:
                pass
            run = client.train(
                model,
                data=columns,
                steps=recipe.steps,
                batch_size=recipe.batch_size,
                microbatches=recipe.microbatches,
                optimizer=recipe.optimizer,
                checkpoint_every=0,
                seed=5,
            )
            for _ in run:
                pass
            files = run.files()
            manifest = run.manifest(files)
        if expected is None:
            oracle = Trainer(model, Record.from_bytes(files.record).recipe, columns)
            losses = {result.step: result.loss for result in oracle.run(recipe.steps)}
            hashes = {vnode: hashlib.sha256(data).hexdigest() for vnode, data in oracle.state_objects().items()}
            expected = losses, hashes
        assert run.losses == expected[0], count
        assert {vnode: state.sha256 for vnode, state in manifest.states.items()} == expected[1], count


def test_text_comes_from_a_network_that_declares_no_output(local: LocalNetwork) -> None:
    """Its heads are one attention in training, its logits exist only where they are asked for."""
    model = dcnr.templates.preset("published-small", layers=1, dim=32, heads=2, vocab=300, context=16)
    while len(local.pnodes) < 2:
        local.start_pnode()
    with dcnr.connect(local.address) as client:
        run = client.train(
            model,
            data=Path(__file__).parents[1] / "**" / "*.py",
            tokenizer="bytes",
            steps=4,
            batch_size=4,
            microbatches=2,
            checkpoint_every=2,
            eval_every=2,
        )
        kinds = [type(event).__name__ for event in run]
        assert "Evaluated" in kinds
        assert len("".join(run.generate("def ", max_tokens=8, seed=1)).encode(errors="replace")) >= 4
        logits = client.forward(model, {"tokens": np.zeros((2, 16), np.int64)})["loss"]
        assert logits.shape == (2, 16, 300)
        weights = run.state_dict(as_torch=True)
        module = model.to_torch()
        module.load_state_dict(weights)
        assert "block_0_attention_head_2.q.weight" in weights


def test_digits_are_told_apart() -> None:
    pytest.importorskip("sklearn")
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "digits.py")], capture_output=True, text=True, timeout=110, check=False
    )
    assert run.returncode == 0, run.stderr
    found = re.search(r"accuracy on \d+ digits not seen: ([\d.]+) %", run.stdout)
    assert found is not None, run.stdout
    assert float(found.group(1)) > 95
