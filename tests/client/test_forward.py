"""Forward passes: what fits, how rows are cut, how outputs come together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

import dcnr
from dcnr.client import forward
from dcnr.client.connect import AsyncClient
from dcnr.client.forward import Batches, Outputs
from dcnr.config import LIMITS, Limits
from dcnr.errors import InvalidData, NoCapacity, ProtocolError, UsageError
from dcnr.network.graph import Definition
from dcnr.protocol.messages import Forward, Forwarded, Message
from tests.client.fake import FakeNetwork


def two_inputs() -> Definition:
    """``sum`` = tokens' embedding + features, and its gelu; the cost hangs at an input of its own."""
    g = dcnr.Graph("mine")
    hidden = g.embedder(g.input("tokens", [6], "int64"), vocab_size=9, dim=4, position_encoding="none")
    total = g.add(hidden, g.input("features", [6, 4], "float32"), id="sum")
    g.output("sum", total)
    g.output("bent", g.gelu(total))
    g.cost("mse", g.relu(g.input("aside", [3], "float32")), target="y")
    return g.definition()


def given(rows: int = 5, length: int = 6) -> dict[str, np.ndarray[Any, Any]]:
    return {
        "tokens": np.arange(rows * length).reshape(rows, length) % 9,
        "features": np.ones((rows, length, 4), np.float32),
    }


def check(changed: dict[str, Any]) -> Batches:
    return forward.check(two_inputs(), {**given(), **changed}, LIMITS)


def test_what_outputs_do_not_need_may_be_left_out() -> None:
    found = check({})
    assert list(found.tensors) == ["tokens", "features"]
    assert (found.rows, found.batch) == (5, 5)
    assert {name: spec.shape for name, spec in found.outputs.items()} == {"sum": (6, 4), "bent": (6, 4)}
    assert list(check({"aside": np.ones((5, 3), np.float32)}).tensors) == ["tokens", "features"]


def test_a_shorter_sequence_gives_shorter_outputs() -> None:
    found = forward.check(two_inputs(), given(length=2), LIMITS)
    assert {spec.shape for spec in found.outputs.values()} == {(2, 4)}
    with pytest.raises(InvalidData, match=r"shorter than declared, which does not fit here \(.*node 'sum'"):
        check({"tokens": given(length=2)["tokens"]})


def test_big_endian_and_strided_arrays_are_what_they_hold() -> None:
    tokens = given()["tokens"]
    found = check({"tokens": np.asfortranarray(tokens.astype(">i8"))})
    assert found.cut(1, 2)[0].data == tokens[1:3].astype("<i8").tobytes()


@pytest.mark.parametrize(
    ("changed", "problems"),
    [
        ({"tokens": np.ones((5, 6), np.int32)}, ["input 'tokens': found int32 [5, 6], expected int64 [rows, 6]"]),
        ({"tokens": np.ones((5, 7), np.int64)}, ["input 'tokens': found int64 [5, 7], expected int64 [rows, 6]"]),
        ({"tokens": np.ones((0, 6), np.int64)}, ["input 'tokens': found int64 [0, 6], expected int64 [rows, 6]"]),
        ({"tokens": np.array([[object()]])}, ["input 'tokens': found object [1, 1], expected int64 [rows, 6]"]),
        ({"tokens": [[1], [2, 3]]}, ["input 'tokens': found rows of different shapes, expected int64 [rows, 6]"]),
        ({"features": np.ones((5, 6, 5), np.float32), "tokns": np.ones(1)},
         ["input 'tokns': found no such input in network 'mine', expected 'tokens'",
          "input 'features': found float32 [5, 6, 5], expected float32 [rows, 6, 4]"]),
        ({"features": np.ones((4, 6, 4), np.float32)},
         ["input 'features': found 4 rows, expected 5 as in input 'tokens'"]),
        ({"tokens": np.full((5, 6), 9)}, ["input 'tokens': found token 9, expected 0 to 8"]),
        ({"tokens": np.full((5, 6), -1)}, ["input 'tokens': found token -1, expected 0 to 8"]),
    ],
)  # fmt: skip
def test_everything_that_does_not_fit_is_named(changed: dict[str, Any], problems: list[str]) -> None:
    with pytest.raises(InvalidData) as caught:
        check(changed)
    assert str(caught.value).split("\n") == problems


def test_absent_inputs_and_absent_outputs() -> None:
    with pytest.raises(InvalidData, match=r"input 'features': found nothing, expected float32 \[rows, 6, 4\]"):
        forward.check(two_inputs(), {"tokens": given()["tokens"]}, LIMITS)
    bare = dcnr.Graph("mlp")
    bare.relu(bare.input("x", [2], "float32"))
    with pytest.raises(UsageError, match="'mlp' has neither an output nor a cost"):
        forward.check(bare.definition(), {"x": np.ones((1, 2), np.float32)}, LIMITS)


def test_rows_are_cut_by_bytes_in_and_by_bytes_out() -> None:
    row_in, row_out = 6 * 8 + 6 * 4 * 4, 2 * 6 * 4 * 4
    by_inputs = Limits(forward_input_bytes=3 * row_in + 1)
    assert forward.check(two_inputs(), given(), by_inputs).batch == 3
    assert forward.check(two_inputs(), given(), Limits(forward_output_bytes=2 * row_out)).batch == 2
    assert forward.check(two_inputs(), given(), Limits(forward_output_bytes=1)).batch == 1
    with pytest.raises(InvalidData, match=f"found {row_in} bytes of inputs in a row"):
        forward.check(two_inputs(), given(), Limits(forward_input_bytes=row_in - 1))
    with pytest.raises(InvalidData, match=f"a row has {row_out} bytes of outputs"):
        forward.check(two_inputs(), given(), Limits(forward_row_bytes=row_out - 1))


class Doubling(FakeNetwork):
    """Answers a network that doubles ``x``, with memory for ``room`` rows; a reply holds one float."""

    def __init__(self, room: int, lost: int = 0) -> None:
        super().__init__()
        self.room, self.lost = room, lost

    async def stream(self, message: Message) -> AsyncIterator[Message]:
        assert isinstance(message, Forward)
        self.asked.append(message)
        if message.rows > self.room:
            raise NoCapacity("too large")
        yield Forwarded(session="s", step=7)  # type: ignore[arg-type]
        (tensor,) = message.inputs
        doubled = 2 * np.frombuffer(tensor.data, np.float32)
        for value in doubled[self.lost :]:
            yield Forwarded(
                session="s",  # type: ignore[arg-type]
                step=7,
                output="y",
                shape=tensor.shape,
                dtype="float32",
                data=value.tobytes(),
            )


def double(network: Doubling, rows: int) -> Outputs:
    g = dcnr.Graph("double")
    x = g.input("x", [2], "float32")
    g.output("y", x + x)
    tensor = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)

    async def ask() -> Outputs:
        batches = forward.check(g.definition(), {"x": tensor}, Limits(forward_input_bytes=6 * 8))
        async with AsyncClient("nowhere", network.toolkit()) as client:
            return await forward.run(client, "target", batches)

    outputs = asyncio.run(ask())
    assert (outputs["y"] == 2 * tensor).all()
    return outputs


def test_batches_come_together_and_are_all_of_one_checkpoint() -> None:
    network = Doubling(room=100)
    outputs = double(network, 14)
    assert (outputs.session, outputs.step) == ("s", 7)
    asked = [(m.target, m.step, m.rows, len(m.inputs[0].data) // 8, m.last) for m in network.asked]  # type: ignore[attr-defined]
    assert asked == [("target", -1, 6, 6, False), ("s", 7, 6, 6, False), ("s", 7, 6, 2, True)]


def test_smaller_batches_are_tried_where_memory_is_short() -> None:
    network = Doubling(room=2)
    double(network, 5)
    assert [m.rows for m in network.asked] == [5, 3, 2, 2, 2]  # type: ignore[attr-defined]
    with pytest.raises(NoCapacity):
        double(Doubling(room=0), 5)


def test_an_output_that_lacks_bytes_is_refused() -> None:
    with pytest.raises(ProtocolError, match=r"output 'y' came with 4 bytes, expected \[1, 2\] float32"):
        double(Doubling(room=9, lost=1), 1)
