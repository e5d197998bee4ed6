"""Who hosts what: memory, classes, near the best, and no needless moves."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import product

import pytest

from dcnr.ids import PeerId, VNodeId
from dcnr.network.analysis import Network, analyse
from dcnr.network.builder import Graph
from dcnr.network.memory import edge_bytes, memory, unit_cost
from dcnr.network.templates import gpt, mlp
from dcnr.orchestrator import placement
from dcnr.orchestrator.placement import Candidate, Placement, Problem, predicted, solve

MLP = analyse(mlp(64, [256, 512, 128, 256], 16).definition())


def a_peer(number: int) -> PeerId:
    return PeerId(f"{number:032x}")


def candidates(*gflops: float, memory_bytes: int = 1 << 30, numeric_class: str = "a") -> tuple[Candidate, ...]:
    return tuple(
        Candidate(peer=a_peer(n), numeric_class=numeric_class, gflops=g, memory_bytes=memory_bytes)
        for n, g in enumerate(gflops)
    )


def a_problem(network: Network, offers: tuple[Candidate, ...], rows: int = 64) -> Problem:
    return Problem(
        network=network,
        candidates=offers,
        rows=rows,
        training=True,
        optimizer="adamw",
        momentum=0.0,
        delay=0,
        prefer_class="",
        window_extra=1,
    )


def solved(problem: Problem) -> Placement:
    answer = solve(problem)
    assert isinstance(answer, Placement), answer
    return answer


def need(problem: Problem, vnodes: list[VNodeId], window: int) -> int:
    return memory(
        problem.network,
        vnodes,
        rows=problem.rows,
        window=window,
        training=True,
        optimizer=problem.optimizer,
        momentum=problem.momentum,
        delay=problem.delay,
    ).total


def slowest_s(problem: Problem, spots: dict[VNodeId, PeerId]) -> float:
    """The slowest PNode's seconds per microbatch, written down anew from the model's description."""
    network, links = problem.network, {c.peer: c.link_bytes_per_s for c in problem.candidates}
    speed = {c.peer: c.gflops * placement.KERNEL_SHARE * 1e9 for c in problem.candidates}
    seconds = dict.fromkeys(speed, 0.0)
    for groups in network.placement_units():
        peer = spots[network.groups[groups[0]].vnodes[0]]
        seconds[peer] += unit_cost(network, groups) * problem.rows * placement.BACKWARD_WORK / speed[peer]
    for index, edge in enumerate(network.definition.edges):
        if spots[edge.source] != spots[edge.target]:
            frames = 2 if index in network.gradient_edges else 1
            for peer in (spots[edge.source], spots[edge.target]):
                sent_s = problem.rows * edge_bytes(network, index) / links[peer]
                seconds[peer] += frames * (placement.FRAME_S + sent_s)
    return max(seconds.values())


def random_problem(seed: int) -> Problem:
    """At most 7 units on at most 3 PNodes, large enough that dividing the work pays now and then."""
    draw = random.Random(seed)
    graph = Graph("random")
    width = draw.choice((64, 256, 1024))
    layers = [graph.input("x", [width], "float32")]
    for number in range(draw.randint(2, 5)):
        source = draw.choice(layers[-2:])
        made = graph.linear(source, out_dim=width, id=f"n{number}")
        layers.append(graph.add(made, source, id=f"sum{number}") if draw.random() < 0.2 else made)
    graph.cost("mse", layers[-1], target="y", id="cost")
    network = analyse(graph.definition())
    offers = candidates(*(draw.choice((5.0, 10.0, 20.0, 80.0)) for _ in range(draw.randint(2, 3))))
    problem = a_problem(network, offers, rows=draw.choice((8, 64, 512)))
    if draw.random() < 0.5:
        whole = need(problem, list(network.vnodes), 2)
        problem = replace(
            problem,
            candidates=tuple(replace(c, memory_bytes=int(whole * draw.uniform(0.7, 1.5))) for c in offers),
        )
    return problem


def fits_anywhere(problem: Problem) -> bool:
    """Exhaustively, with one microbatch open."""
    units = [
        [v for g in groups for v in problem.network.groups[g].vnodes] for groups in problem.network.placement_units()
    ]

    @cache
    def size(together: tuple[int, ...]) -> int:
        return need(problem, [v for unit in together for v in units[unit]], 1)

    offers = range(len(problem.candidates))
    return any(
        all(
            size(tuple(u for u, at in enumerate(hosts) if at == host)) <= problem.candidates[host].memory_bytes
            for host in offers
            if host in hosts
        )
        for hosts in product(offers, repeat=len(units))
    )


@pytest.mark.parametrize("seed", range(60))
def test_predicted_times_are_those_of_the_model_of_costs(seed: int) -> None:
    problem = random_problem(seed)
    answer = solve(problem)
    if isinstance(answer, str):
        assert "MiB" in answer
        assert not fits_anywhere(problem)
        return
    assert max(stage.seconds for stage in answer.stages.values()) == pytest.approx(
        slowest_s(problem, dict(answer.spots)), rel=1e-6
    )
    assert predicted(problem, answer.spots) == answer.stages


# --- stability ----------------------------------------------------------------------------------------------


def moved(before: Placement, after: Placement) -> set[VNodeId]:
    return {v for v in before.spots if before.spots[v] != after.spots[v]}


def test_the_same_problem_again_moves_nothing() -> None:
    placed = 0
    for seed in range(60):
        problem = random_problem(seed)
        answer = solve(problem)
        if isinstance(answer, Placement):
            assert not moved(answer, solved(replace(problem, current=answer.spots))), seed
            placed += 1
    assert placed > 40


def a_chain(units: int) -> Network:
    """Equal layers, of which each may go anywhere at little cost."""
    graph = Graph("chain")
    current = graph.input("x", [1024], "float32")
    for number in range(units):
        current = graph.linear(current, out_dim=1024, id=f"n{number}")
    graph.cost("mse", current, target="y", id="cost")
    return analyse(graph.definition())


def test_after_a_loss_those_that_have_not_lost_anything_keep_what_they_have() -> None:
    network = a_chain(12)
    problem = a_problem(network, candidates(10.0, 10.0, 10.0, 10.0), rows=512)
    before = solved(problem)
    lost = before.spots[network.order[0]]
    rest = replace(problem, candidates=tuple(c for c in problem.candidates if c.peer != lost), current=before.spots)
    after = solved(rest)
    fresh = solved(replace(rest, current={}))
    assert lost not in after.spots.values()
    hosted = {v for v, peer in before.spots.items() if peer == lost}
    assert moved(before, after) == hosted
    assert len(moved(before, fresh)) > len(hosted), "the case shows nothing"
    assert slowest_s(rest, dict(after.spots)) <= placement.STAY_FACTOR * slowest_s(rest, dict(fresh.spots))


def test_staying_gives_way_to_much_better() -> None:
    network = a_chain(8)
    problem = a_problem(network, candidates(10.0, 10.0, 10.0), rows=512)
    everything = dict.fromkeys(network.vnodes, a_peer(0))
    after = solved(replace(problem, current=everything))
    assert slowest_s(problem, dict(after.spots)) < 0.5 * slowest_s(problem, everything)


def test_what_stays_must_still_fit() -> None:
    """A PNode that has refused a ticket offers less than what it would keep: then that is no placement."""
    network = a_chain(6)
    problem = a_problem(network, candidates(10.0, 10.0), rows=512)
    before = solved(problem)
    first, second = problem.candidates
    assert len(set(before.spots.values())) == 2
    room = need(problem, [v for v, peer in before.spots.items() if peer == second.peer], 1)
    offers = (replace(first, memory_bytes=0), replace(second, memory_bytes=room))
    answer = solve(replace(problem, candidates=offers, current=before.spots))
    assert isinstance(answer, str)
    assert "missing" in answer


# --- memory, classes, reasons -------------------------------------------------------------------------------


def test_memory_is_honoured_with_the_window_that_is_given() -> None:
    network = analyse(gpt(layers=3, dim=32, heads=2, vocab=64, context=16).definition())
    problem = a_problem(network, (), rows=2)
    whole = need(problem, list(network.vnodes), 2)
    problem = replace(problem, candidates=candidates(10.0, 10.0, 10.0, memory_bytes=int(whole * 0.6)))
    answer = solved(problem)
    for peer in set(answer.spots.values()):
        assert need(problem, [v for v, p in answer.spots.items() if p == peer], answer.window) <= whole * 0.6
    assert answer.window >= 1


@pytest.mark.parametrize(("layers", "training"), [(40, True), (10, True), (10, False)])
def test_memory_is_exact(layers: int, training: bool) -> None:
    """Two PNodes with room for a half each, to the byte, of a network that can be searched through and of a larger one."""
    network = a_chain(layers)
    problem = replace(a_problem(network, (), rows=2048), training=training)

    def size(vnodes: Sequence[VNodeId]) -> int:
        return memory(network, vnodes, rows=2048, window=2, training=training).total

    halves = network.order[: layers // 2], network.order[layers // 2 :]
    offers = tuple(replace(c, memory_bytes=size(half)) for c, half in zip(candidates(20.0, 10.0), halves, strict=True))
    answer = solved(replace(problem, candidates=offers))
    for offer in offers:
        assert size([v for v in network.order if answer.spots[v] == offer.peer]) <= offer.memory_bytes


def test_a_slow_link_is_not_worth_what_it_costs() -> None:
    problem = a_problem(a_chain(8), candidates(10.0, 10.0), rows=64)
    assert len(set(solved(problem).spots.values())) == 2
    slow = tuple(replace(c, link_bytes_per_s=1e5) for c in problem.candidates)
    assert len(set(solved(replace(problem, candidates=slow)).spots.values())) == 1


def test_a_refusal_says_how_much_is_missing() -> None:
    problem = a_problem(MLP, candidates(10.0, memory_bytes=1 << 20))
    answer = solve(problem)
    assert isinstance(answer, str)
    assert "are missing" in answer
    assert (
        solve(replace(problem, candidates=()))
        == "no PNode is here: start one with `dcnr pnode`, or wait for one to join"
    )
    largest = solve(replace(problem, candidates=candidates(*[10.0] * 40, memory_bytes=1 << 20)))
    assert isinstance(largest, str)
    assert "are missing there" in largest


def test_one_numeric_class_is_enough_where_it_has_room_and_the_sessions_own_comes_first() -> None:
    fast = candidates(80.0, 80.0)
    slow = tuple(replace(c, peer=a_peer(10 + n), numeric_class="b") for n, c in enumerate(candidates(5.0, 5.0)))
    network = a_chain(8)
    problem = a_problem(network, fast + slow)
    classes = {c.peer: c.numeric_class for c in problem.candidates}
    assert {classes[p] for p in solved(problem).spots.values()} == {"a"}
    assert {classes[p] for p in solved(replace(problem, prefer_class="b")).spots.values()} == {"b"}
    part = int(need(problem, list(network.vnodes), 2) * 0.4)
    tight = replace(problem, candidates=tuple(replace(c, memory_bytes=part) for c in fast + slow))
    assert {classes[p] for p in solved(tight).spots.values()} == {"a", "b"}


def test_what_is_tied_or_colocated_stays_together() -> None:
    network = analyse(gpt(layers=2, dim=32, heads=2, vocab=64, context=16).definition())
    answer = solved(a_problem(network, candidates(10.0, 10.0, 10.0), rows=2))
    for groups in network.placement_units():
        assert len({answer.spots[v] for g in groups for v in network.groups[g].vnodes}) == 1


# --- node types ---------------------------------------------------------------------------------------------


def test_a_pnode_of_other_node_types_hosts_nothing() -> None:
    same, other, silent = (
        replace(c, catalogue=digest)
        for c, digest in zip(candidates(10.0, 80.0, 10.0), ("mine", "other", ""), strict=True)
    )
    network = a_chain(8)
    problem = replace(a_problem(network, (same, other, silent), rows=512), catalogue="mine")
    assert set(solved(problem).spots.values()) == {same.peer, silent.peer}
    uncompared = replace(problem, catalogue="")
    assert other.peer in solved(uncompared).spots.values()


def test_a_refusal_says_who_lacks_node_types() -> None:
    offers = tuple(replace(c, catalogue="other") for c in candidates(10.0, 10.0))
    problem = replace(a_problem(MLP, offers), catalogue="mine")
    assert solve(problem) == "2 PNodes lack this network's node types"
    small = replace(offers[0], peer=a_peer(9), catalogue="mine", memory_bytes=1 << 20)
    refusal = solve(replace(problem, candidates=(offers[0], small)))
    assert isinstance(refusal, str)
    assert "the 1 PNodes together" in refusal
    assert refusal.endswith("are missing; 1 PNode lacks this network's node types")
