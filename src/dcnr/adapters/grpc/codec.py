"""Messages to protobuf and back, by reflection over the dataclasses.

The proto message of a class has its name and its fields. NewTypes travel as what they are made of, ``int`` as int64,
``float`` as double (bits matter), tuples as repeated fields, pairs as the small messages of :data:`_PAIRS`.
A :class:`~dcnr.machine.TensorRef` travels as ``Tensor``, without its handle, which means nothing elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from enum import IntEnum
from typing import Any, TypeVar

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Proto

from dcnr.adapters.grpc.generated import messages_pb2
from dcnr.errors import WireError
from dcnr.ids import Incarnation
from dcnr.machine import Handle, TensorRef
from dcnr.protocol import messages
from dcnr.protocol.messages import Message

_PAIRS: dict[tuple[str, str], Any] = {
    ("Adopted", "versions"): messages_pb2.VNodeVersion,
    ("Adopted", "open_microbatches"): messages_pb2.StepMicrobatch,
    ("Adopted", "scales"): messages_pb2.StepScale,
}
"""Tuples of pairs: (class, field) to the message whose fields, in their order, are the pair."""

_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}
"""Bytes of one element of every dtype that may cross a link."""

MESSAGE_CLASSES: tuple[type[Message], ...] = tuple(
    value
    for value in vars(messages).values()
    if isinstance(value, type) and issubclass(value, Message) and value is not Message
)
_Convert = Callable[[Any], Any]
_ProtoT = TypeVar("_ProtoT", bound=Proto)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """How one class is converted: per field, its name, the value on the way out, and the value on the way in."""

    python: type[Any]
    proto: type[Proto]
    fields: tuple[tuple[str, _Convert, _Convert], ...]


def to_proto(message: Message) -> Any:
    """The protobuf twin of ``message``. :class:`WireError` where a value does not fit its field."""
    return _encode(_PLANS[type(message)], message)


def from_proto(proto: Proto) -> Any:
    """The dataclass twin. :class:`WireError` on a missing part, an unknown enum value or a negative shape."""
    plan = _BY_PROTO.get(proto.DESCRIPTOR.full_name)
    if plan is None:
        raise WireError(f"{proto.DESCRIPTOR.full_name} has no message class")
    return _decode(plan, proto)


def proto_class(message_class: type[Message]) -> type[Proto]:
    """The protobuf class of a message class."""
    return _PLANS[message_class].proto


def parse(proto: type[_ProtoT], data: bytes) -> _ProtoT:
    """Bytes to a protobuf message; :class:`WireError` where they are none."""
    try:
        return proto.FromString(data)
    except DecodeError as error:
        raise WireError(f"bytes that are no {proto.DESCRIPTOR.name}: {error}") from error


def tensor_bytes(ref: TensorRef) -> int:
    """Size of the tensor's bytes; :class:`WireError` for a dtype that never crosses a link."""
    if ref.dtype not in _ITEM_BYTES:
        raise WireError(f"dtype {ref.dtype!r} is none of {', '.join(_ITEM_BYTES)}")
    return math.prod(ref.shape) * _ITEM_BYTES[ref.dtype]


def _encode(plan: _Plan, value: Any) -> Proto:
    if type(value) is not plan.python:
        raise WireError(f"expected {plan.python.__name__}, found {type(value).__name__}")
    try:
        return plan.proto(**{name: encode(getattr(value, name)) for name, encode, _ in plan.fields})
    except (TypeError, ValueError) as error:
        raise WireError(f"{plan.python.__name__} cannot be sent: {error}") from error


def _decode(plan: _Plan, proto: Proto) -> Any:
    values = {}
    for name, _, decode in plan.fields:
        try:
            values[name] = decode(proto)
        except ValueError as error:
            raise WireError(f"{plan.python.__name__}.{name}: {error}") from error
    return plan.python(**values)


def _encode_tensor(ref: TensorRef) -> Proto:
    return messages_pb2.Tensor(shape=ref.shape, dtype=ref.dtype, digest=ref.digest)


def decode_tensor(proto: Any) -> TensorRef:
    """A ``Tensor`` as a reference with handle 0, for whoever makes the tensor. :class:`WireError` on a negative shape."""
    shape = tuple(proto.shape)
    if any(size < 0 for size in shape):
        raise WireError(f"a tensor of shape {shape}")
    return TensorRef(
        handle=Handle(0),
        shape=shape,
        dtype=proto.dtype,
        digest=proto.digest if proto.HasField("digest") else None,
    )


def _identity(value: Any) -> Any:
    return value


def _underlying(hint: Any) -> Any:
    """The type that a NewType is made of."""
    while hasattr(hint, "__supertype__"):
        hint = hint.__supertype__
    return hint


def _is_scalar(hint: Any) -> bool:
    return hint in (str, int, bool, float, bytes)


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, IntEnum)


def _item(owner: type[Any], name: str, hint: Any) -> tuple[_Convert, _Convert]:
    """Conversions of one value of type ``hint``, to and from what protobuf holds."""
    hint = _underlying(hint)
    if _is_scalar(hint):
        return _identity, _identity
    if typing.get_origin(hint) is tuple:
        return _pair(_PAIRS[owner.__name__, name])
    if hint is TensorRef:
        return _encode_tensor, decode_tensor
    if _is_enum(hint):
        return int, hint
    plan = _plan(hint)
    return (lambda value: _encode(plan, value)), (lambda proto: _decode(plan, proto))


def _pair(proto: Any) -> tuple[_Convert, _Convert]:
    first, second = (field.name for field in proto.DESCRIPTOR.fields)
    return (
        lambda value: proto(**{first: value[0], second: value[1]}),
        lambda pair: (getattr(pair, first), getattr(pair, second)),
    )


def _field(owner: type[Any], name: str, hint: Any) -> tuple[str, _Convert, _Convert]:
    if typing.get_origin(hint) is tuple:
        encode, decode = _item(owner, name, typing.get_args(hint)[0])
        return (
            name,
            lambda values: [encode(value) for value in values],
            lambda proto: tuple(decode(value) for value in getattr(proto, name)),
        )
    encode, decode = _item(owner, name, hint)
    if _is_scalar(_underlying(hint)) or _is_enum(hint):
        return name, encode, lambda proto: decode(getattr(proto, name))

    def nested(proto: Proto) -> Any:
        if not proto.HasField(name):
            raise WireError(f"{owner.__name__} without {name}")
        return decode(getattr(proto, name))

    return name, encode, nested


def _plan(python: type[Any]) -> _Plan:
    known = _PLANS.get(python)
    if known is None:
        hints = typing.get_type_hints(python)
        known = _PLANS[python] = _Plan(
            python=python,
            proto=getattr(messages_pb2, python.__name__),
            fields=tuple(_field(python, field.name, hints[field.name]) for field in dataclasses.fields(python)),
        )
    return known


_PLANS: dict[type[Any], _Plan] = {}
_plan(Incarnation)
for _class in MESSAGE_CLASSES:
    _plan(_class)
_BY_PROTO: dict[str, _Plan] = {plan.proto.DESCRIPTOR.full_name: plan for plan in _PLANS.values()}
