"""``network analyze`` and ``plan``: figures of a file and of PNodes that are only described, without a network."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dcnr.cli.planning import _explain_vnode, _problem, _span
from dcnr.errors import UnknownName
from dcnr.ids import DatasetId, PeerId, VNodeId
from dcnr.network.analysis import analyse
from dcnr.network.rewrite import TRAINING
from dcnr.network.templates import mlp
from dcnr.network.types import catalogue_digest
from dcnr.orchestrator.placement import Candidate, solve
from dcnr.protocol.messages import Location
from dcnr.session.recipe import Recipe
from dcnr.session.record import Record
from tests.cli.test_usage import dcnr
from tests.client.fake import info, session_record
from tests.network.test_rewrite import graph as heads

EXAMPLES = Path(__file__).parents[2] / "examples"
PNODES = """
- {name: laptop, memory: 4GiB, gflops: 50, numeric_class: a}
- {name: desktop, memory: 8GiB, gflops: 100, numeric_class: a}
"""


def told(*arguments: str) -> dict[str, Any]:
    result = dcnr(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_figures_of_a_small_network_are_those_by_hand() -> None:
    found = told("network", "analyze", str(EXAMPLES / "mlp.yaml"), "--batch-size", "6", "--microbatches", "2")
    parameters = (4 * 32 + 32) + (32 * 32 + 32) + (32 + 1)
    products = 2 * (4 * 32 + 32 * 32 + 32)
    assert found["parameters"] == parameters
    # Beside the products: relu of 64 elements, and a cost of one.
    assert found["flops_per_token"] == found["flops_per_row"] == products + 64 + 8
    assert found["training"]["weights_bytes"] == found["serving"]["weights_bytes"] == 4 * parameters
    assert found["training"]["optimizer_bytes"] == 2 * 4 * parameters
    assert [edge["bytes_per_microbatch"] for edge in found["edges"]] == [3 * 4 * size for size in (32, 32, 32, 32, 1)]
    assert [edge["gradient"] for edge in found["edges"]] == [True] * 5
    assert sum(part["parameters"] for part in found["vnodes"]) == parameters
    assert [part["vnodes"] for part in found["kernel_groups"]] == [[part["vnode"]] for part in found["vnodes"]]


def test_a_token_is_a_position() -> None:
    found = told("network", "analyze", str(EXAMPLES / "gpt-demo.yaml"))
    assert found["tokens_per_row"] == 128
    assert found["flops_per_token"] == found["flops_per_row"] / 128


def test_rewrites_show_the_network_as_it_is_trained() -> None:
    file = str(EXAMPLES / "published-small.yaml")
    written, run = told("network", "analyze", file), told("network", "analyze", file, "--rewrites")
    assert written["rewrites"] == []
    assert run["rewrites"] == ["attention_heads", "tied_head"]
    assert run["parameters"] == written["parameters"] == 27_176_448
    assert len(run["vnodes"]) == len(written["vnodes"]) - 6 * 8 - 1
    assert run["training"]["activations_bytes"] < written["training"]["activations_bytes"]


def test_analysing_loads_neither_grpc_nor_torch() -> None:
    script = (
        "import sys; from dcnr.cli.main import app; "
        f"app(['network', 'analyze', {str(EXAMPLES / 'mlp.yaml')!r}], standalone_mode=False); "
        "sys.exit(', '.join({'grpc', 'torch', 'asyncio'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "linear_0" in done.stdout


def test_a_plan_is_the_placement_with_its_times_and_bytes(tmp_path: Path) -> None:
    pnodes = tmp_path / "pnodes.yaml"
    pnodes.write_text(PNODES)
    found = told("plan", str(EXAMPLES / "gpt-demo.yaml"), "--pnodes", str(pnodes), "--microbatches", "8")
    times = {stage["pnode"]: stage["seconds"] for stage in found["stages"]}
    assert times.keys() == {"laptop", "desktop"}
    slowest = max(times.values())
    assert found["step_s"] == pytest.approx(8 * slowest + sum(times.values()) - slowest)
    assert found["bubble"] == pytest.approx(1 - 8 * slowest / found["step_s"])
    assert min(stage["idle"] for stage in found["stages"]) == pytest.approx(found["bubble"])
    assert all(0 < stage["links_s"] < stage["seconds"] for stage in found["stages"])
    assert found["tokens_per_s"] == pytest.approx(8 * 128 / found["step_s"])
    # What crosses goes back as gradients of the same size.
    forward, backward = ((link["from"], link["to"], link["bytes_per_step"]) for link in found["links"])
    assert forward == (backward[1], backward[0], backward[2])
    assert forward[2] % (8 * 128 * 192 * 4) == 0
    assert sum(len(stage["vnodes"]) for stage in found["stages"]) == 36
    # One microbatch at a time leaves the other stage idle for longer.
    alone = told("plan", str(EXAMPLES / "gpt-demo.yaml"), "--pnodes", str(pnodes), "--microbatches", "1")
    assert alone["bubble"] > found["bubble"]


def test_a_plan_for_people(tmp_path: Path) -> None:
    pnodes = tmp_path / "pnodes.yaml"
    pnodes.write_text(PNODES)
    result = dcnr("plan", str(EXAMPLES / "gpt-demo.yaml"), "--pnodes", str(pnodes))
    assert result.exit_code == 0
    for word in ("predicted", "bubble", "laptop", "desktop", "bytes/step"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        ("", 2, "found no list"),
        ("- {name: a, memory: 1GiB}", 2, "PNode 1: found {'name': 'a', 'memory': '1GiB'}, expected a memory"),
        ("- {name: a, memory: 1GiB, gflops: -1}", 2, "gflops above 0"),
        ("- {name: a, memory: 1GiB, gflop: 5}", 2, "unknown key 'gflop'"),
        ("- {name: a, memory: much, gflops: 5}", 2, "a size is a number"),
        ("- {name: a, memory: 1GiB, gflops: 5}\n- {name: a, memory: 1GiB, gflops: 5}", 2, "a second time"),
        ("- {name: a, memory: 1GiB, gflops: 5, threads: 0}", 2, "threads 0, expected a whole number above 0"),
        ("- {name: a, memory: 1GiB, gflops: 5, link: slow}", 2, "a size is a number"),
        ("- {name: a, memory: 1GiB, gflops: 5, link: 0}", 2, "link 0, expected bytes per second"),
        ("- [", 2, "pnodes.yaml"),
        ("- {name: 2024-99-99, memory: 1GiB, gflops: 5}", 2, "pnodes.yaml"),
        ("- " + "[" * 3000 + "]" * 3000, 2, "pnodes.yaml"),
        ("- {name: a, memory: 1MiB, gflops: 5}", 1, "missing"),
    ],
)
def test_pnodes_that_make_no_sense_are_refused(tmp_path: Path, text: str, code: int, expected: str) -> None:
    pnodes = tmp_path / "pnodes.yaml"
    pnodes.write_text(text)
    result = dcnr("plan", str(EXAMPLES / "gpt-demo.yaml"), "--pnodes", str(pnodes))
    assert result.exit_code == code, result.stderr
    assert result.stderr.count("\n") == 1
    assert expected in result.stderr


def test_threads_make_a_class_and_links_cost_time(tmp_path: Path) -> None:
    pnodes, model = tmp_path / "pnodes.yaml", str(EXAMPLES / "gpt-demo.yaml")

    def hosts(text: str) -> set[str]:
        pnodes.write_text(text)
        return {stage["pnode"] for stage in told("plan", model, "--pnodes", str(pnodes))["stages"]}

    assert hosts(PNODES.replace("numeric_class: a", "threads: 4")) == {"laptop", "desktop"}
    mixed = PNODES.replace("gflops: 50, numeric_class: a", "gflops: 50, threads: 2")
    assert hosts(mixed.replace("numeric_class: a", "threads: 4")) == {"desktop"}, "the other computes other bits"
    slow = hosts(PNODES.replace("numeric_class: a", "threads: 4, link: 100K"))
    assert slow == {"desktop"}, "a link that slow is no gain"


@pytest.mark.parametrize(("catalogue", "fits"), [("own", True), ("", True), ("another", False)])
def test_a_plan_asks_for_the_networks_node_types_as_training_does(catalogue: str, fits: bool) -> None:
    network = analyse(mlp(4, [4], 4).definition())
    digest = catalogue_digest() if catalogue == "own" else catalogue
    here = Candidate(peer=PeerId("a"), numeric_class="c", gflops=1.0, memory_bytes=1 << 20, catalogue=digest)
    answer = solve(_problem(network, Recipe(steps=1), [here]))
    assert isinstance(answer, str) is not fits
    assert fits or "node types" in str(answer)


class Told:
    """A network of which only a session's network is asked."""

    def network(self, name: str) -> tuple[str, Any]:
        return name, heads().definition()

    def events(self) -> list[Any]:
        return []

    nodes = events


def test_a_node_that_a_rewrite_took_in_is_explained_by_where_it_is_computed() -> None:
    record = replace(Record.from_bytes(session_record(DatasetId("d" * 64), "")), rewrites=TRAINING)
    places = tuple(Location(vnode=VNodeId(vnode), peer=PeerId("p" * 64)) for vnode in ("tok", "stack", "loss"))
    net: Any = Told()
    session = info(record=record.to_bytes(), placement=places)
    for asked, vnode, rewrite in (("h1", "stack", "attention_heads"), ("head", "loss", "tied_head")):
        found = _explain_vnode(net, session, asked)
        assert (found["vnode"], found["pnode"]) == (vnode, "p" * 64)
        assert found["computed_inside"] == f"{asked} is computed inside {vnode} (rewrite {rewrite})"
    assert _explain_vnode(net, session, "tok")["computed_inside"] == ""
    with pytest.raises(UnknownName, match="no VNode 'hed' in session s: expected 'head'"):
        _explain_vnode(net, session, "hed")


def test_a_node_of_a_session_that_waits_is_nowhere() -> None:
    record = replace(Record.from_bytes(session_record(DatasetId("d" * 64), "")), rewrites=TRAINING)
    places = (Location(vnode=VNodeId("tok"), peer=PeerId("p" * 64)),)
    net: Any = Told()
    session = info(record=record.to_bytes(), placement=places, state="waiting", reason="12 MiB more are needed")
    found = _explain_vnode(net, session, "tok")
    assert (found["pnode"], found["was_on"]) == ("", "p" * 64)
    assert found["why"] == "session s waits: 12 MiB more are needed"


def test_spans_are_of_neighbours_alone() -> None:
    order = {VNodeId(name): place for place, name in enumerate("abcdef")}

    def span(names: str) -> str:
        return _span([VNodeId(name) for name in names], order)

    assert [span("a"), span("abc"), span("aef"), span("ace")] == ["a", "3: a to c", "3: a, e to f", "3: a, c, e"]
