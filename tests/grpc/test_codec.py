"""Every message has a protobuf twin with exactly its fields, and survives the way there and back bit by bit."""

from __future__ import annotations

import dataclasses
import math
import struct
import typing
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from hypothesis import given
from hypothesis import strategies as st

from dcnr.adapters.grpc.codec import MESSAGE_CLASSES, from_proto, parse, proto_class, to_proto
from dcnr.adapters.grpc.generated import link_pb2, messages_pb2, services_pb2
from dcnr.adapters.grpc.link import chunk_frames, control_frame
from dcnr.errors import WireError
from dcnr.ids import Incarnation
from dcnr.machine import Handle, TensorRef
from dcnr.protocol import messages
from dcnr.protocol.messages import Heartbeat, Message, Progress, StepSummary, TensorFrame
from tests.grpc.peers import beat, frame_of

BASELINE = Path(__file__).parents[2] / "proto" / "baseline.binpb"
INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
TENSORS = st.builds(
    TensorRef,
    handle=st.just(Handle(0)),
    shape=st.lists(st.integers(0, 2**40), max_size=4).map(tuple),
    dtype=TEXT,
    digest=st.none() | TEXT,
)


def _values(hint: Any) -> st.SearchStrategy[Any]:
    while hasattr(hint, "__supertype__"):
        hint = hint.__supertype__
    if typing.get_origin(hint) is tuple:
        arguments = typing.get_args(hint)
        if arguments[-1] is Ellipsis:
            return st.lists(_values(arguments[0]), max_size=3).map(tuple)
        return st.tuples(*(_values(argument) for argument in arguments))
    simple: dict[Any, st.SearchStrategy[Any]] = {
        str: TEXT,
        int: INT64,
        bool: st.booleans(),
        float: st.floats(allow_nan=False),
        bytes: st.binary(max_size=8),
        TensorRef: TENSORS,
    }
    if hint in simple:
        return simple[hint]
    if issubclass(hint, IntEnum):
        return st.sampled_from(hint)
    return _messages(hint)


def _messages(message: type[Any]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(message)
    return st.builds(message, **{field.name: _values(hints[field.name]) for field in dataclasses.fields(message)})


def test_every_message_class_is_known() -> None:
    declared = {
        value
        for value in vars(messages).values()
        if isinstance(value, type) and issubclass(value, Message) and value is not Message
    }
    assert declared == set(MESSAGE_CLASSES)
    assert len(declared) > 60


RETIRED = {"Adopted": {"positions", "snapshots", "losses", "summaries", "step_close", "step_close_scale"}}
"""Fields that nobody sends or reads any more: their numbers stay taken."""


@pytest.mark.parametrize("message", [Incarnation, *MESSAGE_CLASSES], ids=lambda message: message.__name__)
def test_the_proto_twin_has_exactly_the_fields(message: type[Any]) -> None:
    twin = getattr(messages_pb2, message.__name__).DESCRIPTOR
    retired = RETIRED.get(message.__name__, set())
    assert {field.name for field in twin.fields} == {field.name for field in dataclasses.fields(message)} | retired
    for field in twin.fields:
        assert field.type not in {field.TYPE_FLOAT, field.TYPE_INT32, field.TYPE_UINT64}, "bits or range would be lost"


@pytest.mark.parametrize("message", MESSAGE_CLASSES, ids=lambda message: message.__name__)
def test_messages_survive_the_wire(message: type[Message]) -> None:
    @given(_messages(message))
    def survives(original: Message) -> None:
        data = to_proto(original).SerializeToString()
        assert repr(from_proto(parse(proto_class(message), data))) == repr(original)

    survives()


@given(st.integers(0, 2**64 - 1))
def test_every_bit_of_a_float_survives(bits: int) -> None:
    (value,) = struct.unpack("<d", bits.to_bytes(8, "little"))
    data = to_proto(StepSummary(vnode="v", grad_sq=value, finite=False)).SerializeToString()  # type: ignore[arg-type]
    there = from_proto(parse(messages_pb2.StepSummary, data)).grad_sq
    assert math.isnan(value) or struct.pack("<d", there) == struct.pack("<d", value)
    assert math.isnan(there) == math.isnan(value)


@pytest.mark.parametrize(
    ("proto", "problem"),
    [
        (messages_pb2.FrameAck(status=9), "FrameAck.status: 9"),
        (messages_pb2.Register(), "Register without descriptor"),
        (messages_pb2.Register(descriptor=messages_pb2.Descriptor()), "Descriptor without incarnation"),
        (messages_pb2.Tensor(shape=[1]), "has no message class"),
        (
            messages_pb2.TensorFrame(
                target_incarnation=messages_pb2.Incarnation(), tensor=messages_pb2.Tensor(shape=[2, -1])
            ),
            r"shape \(2, -1\)",
        ),
    ],
)
def test_what_cannot_be_a_message_is_refused(proto: Any, problem: str) -> None:
    with pytest.raises(WireError, match=problem):
        from_proto(proto)


@pytest.mark.parametrize(
    "message",
    [
        dataclasses.replace(beat(0), sequence=2**63),
        dataclasses.replace(beat(0), sequence="one"),
        dataclasses.replace(beat(0), progress=(beat(1),)),
        StepSummary(vnode="\ud800", grad_sq=0.0, finite=True),  # type: ignore[arg-type]
    ],
)
def test_values_that_do_not_fit_are_refused_before_they_are_sent(message: Message) -> None:
    with pytest.raises(WireError, match=r"Heartbeat|StepSummary|Progress"):
        to_proto(message)


def test_bytes_that_are_no_message_are_refused() -> None:
    with pytest.raises(WireError, match="no Heartbeat"):
        parse(proto_class(Heartbeat), b"\xff\xff")


def test_only_control_messages_travel_as_control_frames() -> None:
    assert link_pb2.Frame.FromString(control_frame(beat(3))).heartbeat.sequence == 3
    with pytest.raises(WireError, match="Progress is no control message"):
        control_frame(Progress(session="s", epoch=1, tasks_done=0, task_age_s=0, task_usual_s=0))  # type: ignore[arg-type]


@given(st.binary(max_size=2000), st.integers(1, 700))
def test_chunks_are_what_protobuf_itself_would_write(data: bytes, chunk_bytes: int) -> None:
    frame: TensorFrame = frame_of(np.frombuffer(data, np.uint8))
    parts = list(chunk_frames(5, frame, memoryview(data), chunk_bytes))
    chunks = [link_pb2.Frame.FromString(part).chunk for part in parts]
    for part, chunk in zip(parts, chunks, strict=True):
        # An empty field may be left out or not: the only difference there is.
        assert not chunk.data or link_pb2.Frame(chunk=chunk).SerializeToString() == part
    assert b"".join(chunk.data for chunk in chunks) == data
    assert [chunk.HasField("header") for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert from_proto(chunks[0].header) == frame


# --- fields are only ever added ----------------------------------------------------------------------------


def _described() -> descriptor_pb2.FileDescriptorSet:
    files = descriptor_pb2.FileDescriptorSet()
    for module in (messages_pb2, link_pb2, services_pb2):
        module.DESCRIPTOR.CopyToProto(files.file.add())
    return files


def _facts(files: descriptor_pb2.FileDescriptorSet) -> dict[str, tuple[Any, ...]]:
    """Everything that a peer of another version relies on, by name."""
    facts: dict[str, tuple[Any, ...]] = {}
    for file in files.file:
        for message in file.message_type:
            facts[message.name] = ("message",)
            for field in message.field:
                facts[f"{message.name}.{field.name}"] = (
                    field.number,
                    field.type,
                    field.label,
                    field.type_name,
                    message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else "",
                )
        for enum in file.enum_type:
            for value in enum.value:
                facts[f"{enum.name}.{value.name}"] = (value.number,)
        for service in file.service:
            for rpc in service.method:
                facts[f"{service.name}/{rpc.name}"] = (
                    rpc.input_type,
                    rpc.output_type,
                    rpc.client_streaming,
                    rpc.server_streaming,
                )
    return facts


def test_nothing_of_the_committed_description_is_gone_or_changed() -> None:
    baseline = _facts(descriptor_pb2.FileDescriptorSet.FromString(BASELINE.read_bytes()))
    current = _facts(_described())
    assert len(baseline) > 300
    changed = {name: (fact, current.get(name)) for name, fact in baseline.items() if current.get(name) != fact}
    assert changed == {}, "a peer of an older version would misunderstand; add a new field instead"
