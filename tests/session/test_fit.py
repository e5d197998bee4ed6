"""A dataset that does not fit a network is refused with the column, what was found and what was expected."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

from dcnr.errors import InvalidData, InvalidNetwork, UsageError
from dcnr.ids import Sha256, VNodeId
from dcnr.network import templates
from dcnr.network.analysis import analyse
from dcnr.network.builder import Graph
from dcnr.network.graph import MetricSpec
from dcnr.network.rewrite import TRAINING, rewritten
from dcnr.session.dataset import Column, Manifest, Shard, Split, TokenizerRef
from dcnr.session.fit import context_of, same_weights
from dcnr.session.recipe import Recipe
from tests.network.test_rewrite import graph as heads

RECIPE = Recipe(steps=1, batch_size=8, microbatches=1)
A = Sha256("a" * 64)
X = Column(name="x", dtype="float32", shape=(64,))
Y = Column(name="y", dtype="int64", shape=())


def columns(*stored: Column, rows: int = 8, held: int = 0) -> Manifest:
    return Manifest(
        name="digits",
        kind="columns",
        stored=stored,
        train=Split(count=rows, shards=tuple((Shard(sha256=A, count=rows),) for _ in stored)),
        validation=Split(count=held, shards=tuple((Shard(sha256=A, count=held),) if held else () for _ in stored)),
    )


def text(tokens: int, vocab: int = 300) -> Manifest:
    return Manifest(
        name="book",
        kind="text",
        stored=(Column(name="tokens", dtype="uint16", shape=()),),
        train=Split(count=tokens, shards=((Shard(sha256=A, count=tokens),),)),
        validation=Split(count=0, shards=((),)),
        tokenizer=TokenizerRef(kind="bytes", sha256=A, vocab=vocab),
        text_sha256="b" * 64,
    )


def classifier(name: str = "x", column: str | None = None) -> Graph:
    g = Graph("classifier")
    h = g.linear(g.input(name, [64], "float32", column=column), out_dim=10)
    g.cost("ce_logits", h, target="y", id="loss")
    return g


def fit(graph: Graph, manifest: Manifest) -> int:
    return context_of(analyse(graph.definition()), manifest, RECIPE)


def test_columns_that_fit() -> None:
    assert fit(classifier(), columns(Y, X)) == 0


def test_an_input_that_names_no_column_takes_the_first() -> None:
    assert fit(classifier("pixels"), columns(X, Y)) == 0
    with pytest.raises(InvalidData, match=r"input 'pixels': found column 'y' of int64 \[\], expected float32 \[64\]"):
        fit(classifier("pixels"), columns(Y, X))


HAS = "; dataset 'digits' has "


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        ((X,), "cost 'loss': found no column 'y', expected one of int64 []" + HAS + "x float32 [64]"),
        (
            (X, Column(name="y", dtype="float32", shape=())),
            "cost 'loss': found column 'y' of float32 [], expected int64 []" + HAS + "x float32 [64], y float32 []",
        ),
        (
            (X, Column(name="y", dtype="int64", shape=(1,))),
            "cost 'loss': found column 'y' of int64 [1], expected int64 []",
        ),
        (
            (Column(name="x", dtype="float64", shape=(64,)), Y),
            "input 'x': found column 'x' of float64 [64], expected float32 [64]"
            + HAS
            + "x float64 [64], y int64 []; add it with --dtype x=float32",
        ),
        (
            (Column(name="x", dtype="float32", shape=(8, 8)), Y),
            "input 'x': found column 'x' of float32 [8, 8], expected float32 [64]"
            + HAS
            + "x float32 [8, 8], y int64 []",
        ),
    ],
)
def test_columns_that_do_not_fit(stored: Sequence[Column], reason: str) -> None:
    with pytest.raises(InvalidData, match=re.escape(reason)):
        fit(classifier(), columns(*stored))


def test_an_input_that_names_a_column_takes_no_other() -> None:
    with pytest.raises(InvalidData, match="input 'x': found no column 'pixels', expected one of float32"):
        fit(classifier("x", "pixels"), columns(X, Y))


def test_fewer_rows_than_a_batch() -> None:
    with pytest.raises(InvalidData, match="dataset 'digits' has 7 rows for training, fewer than a batch of 8"):
        fit(classifier(), columns(X, Y, rows=7))
    gpt = templates.gpt(layers=1, dim=8, heads=2, vocab=300, context=4)
    assert fit(gpt, text(33)) == 4
    with pytest.raises(
        InvalidData, match="dataset 'book' has 7 rows of 4 tokens for training, fewer than a batch of 8"
    ):
        fit(gpt, text(32))


def test_nothing_to_evaluate_on() -> None:
    g = analyse(classifier().definition())
    asked = replace(RECIPE, eval_every=5)
    for held in (0, RECIPE.rows - 1):
        few = columns(X, Y, held=held)
        assert context_of(g, few, RECIPE) == 0
        reason = (
            f"eval every 5: dataset 'digits' holds {held} rows out for validation, expected at least a microbatch of"
        )
        with pytest.raises(UsageError, match=reason):
            context_of(g, few, asked)
    assert context_of(g, columns(X, Y, held=RECIPE.rows), asked) == 0


def test_more_tokens_than_the_network_knows() -> None:
    gpt = templates.gpt(layers=1, dim=8, heads=2, vocab=300, context=4)
    with pytest.raises(InvalidData, match="node 'embedder' knows 300 tokens, the dataset's tokenizer makes 301"):
        fit(gpt, text(100, 301))


def test_tokens_reach_an_embedder_through_views() -> None:
    g = Graph("views")
    first, second = g.broadcast(g.input("tokens", [4], "int64"))
    h = g.embedder(first, vocab_size=300, dim=8, position_encoding="none")
    h = h + g.embedder(g.reshape(second, target_shape=(4,)), vocab_size=5, dim=8, position_encoding="none", id="few")
    g.cost("ce_logits", g.linear(h, out_dim=300), target="targets")
    assert fit(g, text(100, 5)) == 4
    with pytest.raises(InvalidData, match="node 'few' knows 5 tokens, the dataset's tokenizer makes 300"):
        fit(g, text(100))


@pytest.mark.parametrize("inside", [False, True])
def test_more_tokens_than_classes(inside: bool) -> None:
    """Also where the logits are inside of the cost."""
    g = Graph("few")
    h = g.embedder(g.input("tokens", [4], "int64"), vocab_size=300, dim=8, position_encoding="none")
    logits = g.linear(h, out_dim=10, bias=False, alias="ten")
    if inside:
        g.output("logits", logits)
        g.cost("tied_lm_head_ce", h, tie="ten", target="targets", id="loss")
    else:
        g.cost("ce_logits", logits, target="targets", id="loss")
    assert fit(g, text(100, 10)) == 4
    with pytest.raises(InvalidData, match="cost 'loss' has 10 classes, the dataset's tokenizer makes 300 tokens"):
        fit(g, text(100))


def test_weights_of_a_session_are_compared_as_they_are_written() -> None:
    """A rewrite makes one parameter of several; a metric on one of the heads keeps them apart."""
    definition = heads().definition()
    metric = MetricSpec(name="m", type="grad_norm", node_id=VNodeId("h0"))
    apart = rewritten(analyse(replace(definition, metrics=(metric,))), TRAINING)
    whole = rewritten(analyse(definition), TRAINING)
    turned = rewritten(analyse(heads(order=(2, 0, 1)).definition()), TRAINING)
    same_weights(whole, whole)
    same_weights(apart, apart)
    one, each = "heads 'h0', 'h1', 'h2' as one", "each head by itself"
    for network, source, mine, theirs in (
        (whole, apart, one, each),
        (apart, whole, each, one),
        (whole, turned, one, "heads 'h2', 'h0', 'h1' as one"),
    ):
        with pytest.raises(InvalidNetwork) as caught:
            same_weights(network, source)
        (found,) = caught.value.problems
        assert found.startswith(f"node 'stack': the network computes {mine}, the session {theirs}; expected both alike")
    with pytest.raises(InvalidNetwork) as caught:
        same_weights(whole, rewritten(analyse(heads(tied=False).definition()), TRAINING))
    assert caught.value.problems == (
        "head.weight: the session has float32 [11, 12], the network has no such parameter",
    )
