"""Generation and evaluation read a committed checkpoint, on instances of their own, through the network."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import dcnr
from dcnr.adapters.text import load_tokenizer
from dcnr.oracle import Trainer
from dcnr.protocol.messages import RowsRef
from dcnr.runtime.supervisor import LocalNetwork
from dcnr.session.dataset import Manifest, tokenizer_key
from dcnr.session.events import CheckpointCommitted, Evaluated, StepDone
from dcnr.session.record import Record

STEPS = 60


def test_greedy_text_is_that_of_the_checkpoint_in_one_process(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def function_{i % 7}(x):\n    return x + {i % 11}\n\n" for i in range(3000)))
    model = dcnr.templates.gpt(layers=2, dim=32, heads=2, vocab=300, context=16)
    with LocalNetwork(tmp_path / "network", 2, 1) as local, dcnr.connect(local.address) as client:
        run = client.train(
            model,
            data=str(text),
            tokenizer="bpe:300",
            steps=STEPS,
            batch_size=4,
            microbatches=2,
            optimizer=dcnr.AdamW(lr=1e-2),
            checkpoint_every=20,
            eval_every=30,
            eval_batches=2,
        )
        events = list(run)
        evaluated = [e for e in events if isinstance(e, Evaluated)]
        commits = [e.step for e in events if isinstance(e, CheckpointCommitted)]
        steps = [e for e in events if isinstance(e, StepDone)]
        assert commits[-1] == STEPS
        assert evaluated[-1].step == STEPS
        assert all(e.step in commits for e in evaluated)
        assert evaluated[-1].loss == pytest.approx(steps[-1].loss, abs=0.5)
        assert steps[-1].loss < steps[0].loss / 2

        # The reference: the oracle's loss of the same weights over the same held-out rows, batch by batch.
        found = run.validate()
        files = run.files()
        record = Record.from_bytes(files.record)
        oracle = Trainer(model, record.recipe, {"tokens": np.zeros((4, 16), int), "targets": np.zeros((4, 16), int)})
        states = run.manifest(files)
        oracle.load_states(STEPS, {vnode: run.state_object(files, states, vnode) for vnode in states.states})
        assert found.rows == record.rows_validation - record.rows_validation % 2 > 0
        rows = RowsRef(
            dataset=record.dataset,
            split="validation",
            context=16,
            rows=tuple(range(found.rows)),
            columns=("tokens", "targets"),
            token=files.rows_token,
        )
        assert found.step == STEPS
        assert found.loss == pytest.approx(oracle.loss(client.columns(rows)), rel=1e-5)
        assert found.perplexity == math.exp(found.loss)

        pieces = list(run.generate("def ", max_tokens=24, temperature=0.0))
        again = "".join(run.generate("def ", max_tokens=24, temperature=0.0))
        module = model.to_torch()
        module.load_state_dict(run.state_dict(as_torch=True))
        manifest = Manifest.from_bytes(client.dataset(client.session(run.id).info().dataset)[1])
        assert manifest.tokenizer is not None
        store = tmp_path / "network" / "store"
        tokenizer = load_tokenizer((store / tokenizer_key(manifest.tokenizer.sha256)).read_bytes())
        tokens = tokenizer.encode("def ")
        prompt = len(tokens)
        with torch.no_grad():
            for _ in range(24):
                logits = module(tokens=torch.tensor([tokens[-16:]]))
                tokens.append(int(logits[0, -1].argmax()))
        assert "".join(pieces) == again == tokenizer.decode(tokens[prompt:])
