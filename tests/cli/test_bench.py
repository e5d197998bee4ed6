"""What the benchmark compares with: stages that are the network, and children that train them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dcnr.adapters.torch.module import to_torch
from dcnr.cli import bench_head, bench_placement, bench_train
from dcnr.cli.bench_stage import stage
from dcnr.cli.bench_train import Samples, Stage, ask, child, memory, split
from dcnr.errors import ComputeError
from dcnr.network import templates
from dcnr.network.analysis import Network, analyse
from dcnr.network.graph import Definition, canonical_json
from dcnr.session.events import Placed

CONTEXT = 8


def small() -> Network:
    return analyse(templates.gpt(layers=2, dim=16, heads=2, vocab=32, context=CONTEXT, tied=False).definition())


def placed(network: Network, first: int, window: int = 3) -> Placed:
    """The first VNodes on "b", the others on "a"."""
    vnodes = {str(vnode): "b" if n < first else "a" for n, vnode in enumerate(network.order)}
    return Placed(index=2, base_step=0, window=window, vnodes=vnodes, why={}, numeric_class="")


def border(network: Network) -> int:
    """Where the second block starts."""
    return next(n for n, vnode in enumerate(network.order) if vnode.startswith("block_1"))


def test_the_stages_one_after_the_other_are_the_network() -> None:
    network = small()
    parts = split(network.definition, placed(network, border(network)), ["a", "b"])
    assert [(part.pnode, part.in_flight) for part in parts] == [(1, 3), (0, 1)]
    whole = to_torch(network.definition)
    modules = [to_torch(part.definition) for part in parts]
    held = [name for module in modules for name in module.state_dict()]
    assert sorted(held) == sorted(whole.state_dict())
    tensor = tokens = torch.randint(32, (3, CONTEXT))
    for part, module in zip(parts, modules, strict=True):
        (name,) = {entry.name for entry in part.definition.inputs}
        tensor = module(**{name: tensor})
    assert torch.equal(tensor, whole(tokens=tokens))


def test_a_placement_that_is_no_chain_of_two_is_refused() -> None:
    network = small()
    with pytest.raises(ComputeError, match="1 segments on 2 PNodes"):
        split(network.definition, placed(network, 0), ["a", "b"])


def test_memory_is_compared_at_the_peak_of_sessions_that_were_placed_alike() -> None:
    network = small()
    usual, other = placed(network, border(network)), placed(network, 1)
    samples = Samples(pnode_bytes=[[50, 10], [60, 11], [999, 999], [999, 999], [55, 30], [54, 12]])
    samples.placed = [usual, other, usual]
    nothing = network.definition
    stages = [
        Stage(pnode=1, vnodes=4, definition=nothing, in_flight=3),
        Stage(pnode=0, vnodes=3, definition=nothing, in_flight=1),
    ]
    found = memory(stages, samples, [[5, 6], [40, 20]])
    assert [part["difference"] for part in found["samples"]["pnodes"]] == [30 - 6, 60 - 40]
    assert (found["value"], found["goal"], found["holds"]) == (24, 100 << 20, True)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "BATCH", 4)
    monkeypatch.setattr(bench_train, "DROPPED", 1)
    monkeypatch.setattr(bench_train, "MEASURED", 2)


def written(folder: Path, definitions: list[Definition]) -> list[Path]:
    files = [folder / f"{number}.json" for number in range(len(definitions))]
    for file, definition in zip(files, definitions, strict=True):
        file.write_bytes(canonical_json(definition))
    return files


def halves() -> list[Definition]:
    network = small()
    at = border(network)
    return [stage(network, network.order[:at]), stage(network, network.order[at:])]


@pytest.mark.usefixtures("tiny")
def test_pipelining_trains_both_stages_with_any_number_of_microbatches(tmp_path: Path) -> None:
    arguments = [tmp_path / "rendezvous", *written(tmp_path, halves())]
    with (
        child("dcnr.cli.bench_pipelining", [0, *arguments], 1) as first,
        child("dcnr.cli.bench_pipelining", [1, *arguments], 1) as second,
    ):
        for microbatches in (2, 4):
            answers = ask([first, second], microbatches)
            assert [len(samples) for samples in answers] == [2, 2]
            assert min(map(min, answers)) > 0


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("last", [False, True])
def test_plain_pytorch_trains_either_segment(tmp_path: Path, last: bool) -> None:
    with child("dcnr.cli.bench_segment", [written(tmp_path, halves())[last]], 1) as segment:
        (sizes,) = ask([segment], 4, in_flight=1 if last else 3, last=last)
    assert len(sizes) == 2
    assert min(sizes) > 50 << 20, "torch alone is larger"


@pytest.mark.usefixtures("tiny")
def test_a_child_that_ends_early_is_an_error(tmp_path: Path) -> None:
    with (
        child("dcnr.cli.bench_segment", [tmp_path / "missing.json"], 1) as segment,
        pytest.raises(ComputeError, match="ended early"),
    ):
        ask([segment], 4, in_flight=1, last=True)


def test_the_heads_line_compares_both_forms() -> None:
    """Every figure of one process each; the rewritten form never holds the logits, so it needs less on any machine."""
    (line,) = bench_head.measure(1)
    assert (line["bench"], line["figure"], line["unit"]) == ("head", "tied_head_memory", "ratio")
    (written,), (run,) = line["samples"]["written"], line["samples"]["run"]
    assert line["value"] == round(run / written, 4)
    # The logits alone are 256 MiB; they and their gradient are what the written form holds.
    assert written - run > 256 << 20


def test_placements_line_is_of_a_problem_that_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_placement, "VNODES", 12)
    monkeypatch.setattr(bench_placement, "PNODES", 6)
    assert len(bench_placement.a_problem().network.vnodes) == 12
    (line,) = bench_placement.measure(3)
    assert set(line) == {"bench", "figure", "value", "unit", "against", "goal", "holds", "samples"}
    assert (line["bench"], line["unit"], len(line["samples"])) == ("placement", "s", 3)
    assert line["value"] == round(sorted(line["samples"])[1], 4)
    assert line["holds"] == (line["value"] < line["goal"])
    assert line["against"].startswith("12 VNodes in a chain, 6 PNodes")
    monkeypatch.setattr(bench_placement, "MEMORY_BYTES", 1 << 10)
    with pytest.raises(ComputeError, match=r"nothing was placed: .* are missing"):
        bench_placement.measure(1)
