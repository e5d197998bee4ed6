"""Drawing a token: a function of the logits, the seed and the position, the same on every machine."""

from __future__ import annotations

import numpy as np
import pytest

from dcnr.adapters.sampling import draw
from dcnr.machine import Handle, TensorRef
from dcnr.orchestrator.serving import Sample

LOGITS = np.zeros(1000)


def drawn(seed: int, temperature: float = 1.0) -> list[int]:
    ref = TensorRef(handle=Handle(1), shape=(1, 1, 1000), dtype="float64", digest=None)
    tasks = (Sample(logits=ref, temperature=temperature, top_p=1.0, seed=seed, position=p) for p in range(8))
    return [draw(LOGITS, task) for task in tasks]


@pytest.mark.filterwarnings("error")
def test_every_seed_draws_its_own_tokens() -> None:
    """Negative seeds too: their words are those of two's complement."""
    seeds = (0, 1, 2**63, 2**64 - 2, -1, -3, -1000)
    assert len({tuple(drawn(seed)) for seed in seeds}) == len(seeds)
    assert drawn(-1) == drawn(2**64 - 1)
    assert drawn(5) == drawn(5)


def test_without_a_temperature_the_most_probable_is_drawn() -> None:
    assert drawn(3, temperature=0.0) == [0] * 8
