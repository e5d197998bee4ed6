"""What an entry of the catalogue is made of: keys, slots, shapes, parameters, cost, arithmetic; and what entries share.

Shapes leave out the batch axis throughout; ``T`` is a sequence length. The tensors of an entry's arithmetic have it first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from dcnr.ids import VNodeId
from dcnr.network.graph import ConfigValue

Settings = Mapping[str, ConfigValue]
"""A node's config with every default filled in, values in their declared types."""

DTYPE_OF: Final[Mapping[str, str]] = {"float32": "float32", "float64": "float64", "bf16": "bfloat16"}
"""A precision, as files name it, and the dtype of its tensors."""
PRECISIONS: Final = tuple(DTYPE_OF)
FLOATING: Final = frozenset(DTYPE_OF.values())
DTYPE_BYTES: Final[Mapping[str, int]] = {"float32": 4, "float64": 8, "bfloat16": 2, "int64": 8}
INPUT_DTYPES: Final = ("float32", "float64", "int64")
"""What enters a network: datasets are made of numpy's dtypes, and bfloat16 is none of them."""
HEAD_CHUNK: Final = 1 << 22
"""Logits that ``Library.head_cross_entropy`` holds at once, in elements: 16 MiB in float32. Part of the arithmetic, as it
decides which rows are multiplied together."""
INIT_STD: Final = 0.02
DIMENSION_MOST: Final = 2**31 - 1
"""Largest dimension: tensor libraries index kernels with 32 bits, and a larger number is a slip of the finger."""
ELEMENTS_MOST: Final = 2**40
"""Elements of the largest tensor: more than any machine holds, and few enough that no product of sizes overflows."""
AXES_MOST: Final = 8
"""Axes of the largest tensor, the batch axis aside: torch's kernels are made for few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Shape without the batch axis, and dtype (one of :data:`DTYPE_BYTES`)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of one row."""
        return self.elements * DTYPE_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSpec:
    """A parameter that a VNode owns. ``init`` is ``normal``, ``zeros`` or ``ones``; ``std`` belongs to normal."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    init: str
    std: float

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype]

    @property
    def wide_dtype(self) -> str:
        """Of the sums of its gradient and of the optimizer's state: bfloat16 is too coarse to add up in."""
        return from_numpy(self.dtype)

    @property
    def wide_bytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.wide_dtype]


class Mismatch(Exception):
    """What a shape rule found and what it expected; becomes one line of :class:`~dcnr.errors.InvalidNetwork`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One config key. ``default`` None means absent, unless ``derive`` computes it from the other values.

    ``kind``: ``str``, ``bool``, ``int``, ``float`` or ``ints`` (a list of integers). ``none``: the text ``none`` stands
    for absent. ``about`` says what the key is for, ``derived`` in words what ``derive`` computes: both are for people.
    """

    name: str
    kind: str
    default: ConfigValue = None
    required: bool = False
    derive: Callable[[Settings], ConfigValue] | None = None
    choices: tuple[str, ...] = ()
    none: bool = False
    least: float | None = None
    below: float | None = None
    about: str = ""
    derived: str = ""


Inputs = tuple[TensorSpec, ...]
Count = Callable[[Settings, Inputs, Inputs], int]
"""A number of one row, from the settings, the inputs and the outputs."""


def _one(_: Settings) -> int:
    return 1


def _none(_: Settings) -> tuple[ParameterSpec, ...]:
    return ()


def _no_problems(_: Settings) -> tuple[str, ...]:
    return ()


def _infer_nothing(_config: Settings, _inputs: Inputs, _tied: tuple[int, ...] | None) -> Settings:
    return {}


def _every_element(_: Settings) -> int | None:
    return None


def _no_default_input(_: Settings) -> TensorSpec | None:
    return None


def _zero(_settings: Settings, _inputs: Inputs, _outputs: Inputs) -> int:
    return 0


def _nothing_else(_settings: Settings, _inputs: Inputs, _rows: int) -> int:
    return 0


# --- arithmetic --------------------------------------------------------------------------------------------

Tensor = Any
"""Of the library that computes, the batch axis first."""
Tensors = tuple[Tensor, ...]
Weights = Mapping[str, Tensor]
"""A node's parameters by name, a tied one included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What arithmetic may depend on besides tensors: all of it is in the record or follows from (step, row)."""

    vnode: VNodeId
    settings: Settings
    seed: int = 0
    step: int = 0
    first_row: int = 0
    """Position of the first row in the step's batch."""
    training: bool = False
    target: Tensor = None
    """Of a cost."""
    valid: int = 0
    """Valid targets of the whole step, of a cost."""


class Library(Protocol):
    """What arithmetic is written in: torch, and the few functions that it lacks.

    Passed to every kernel instead of imported, so that the processes that describe networks never load torch.
    """

    torch: Any
    functional: Any
    """``torch.nn.functional``."""

    def dtype(self, settings: Settings) -> Any:
        """The library's dtype that a node of these settings computes in."""
        ...

    def fan_out(self, tensor: Tensor, count: int) -> Tensors:
        """``tensor`` for ``count`` readers, whose gradients are folded in their order."""
        ...

    def rotate(self, tensor: Tensor, theta: float, scaling: float) -> Tensor:
        """Rotary positions of [rows, T, heads, size] (Su et al., 2021), positions divided by ``scaling``."""
        ...

    def dropout_mask(self, call: Call, tensor: Tensor, rate: float) -> Tensor:
        """0 or 1 / (1 - rate) per element of ``tensor``: a function of (seed, VNode, step, row)."""
        ...

    def fixed_pattern(self, seed: int, length: int, rate: float) -> Tensor:
        """Booleans [length, length], True with probability ``rate``: a function of (seed, row, column)."""
        ...

    def head_cross_entropy(
        self, x: Tensor, weight: Tensor, target: Tensor, *, ignored: int, smoothing: float, z: float
    ) -> Tensor:
        """The sum of what cross entropy of ``x @ weight.T`` gives per valid target, never holding all the logits."""
        ...


Kernel = Callable[[Library, Tensors, Weights, Call], Tensors]
"""Writes into nothing that it was given, and keeps nothing between calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A small use of a type: what its derivatives, bounds and bits are checked on. Adding a type means giving one."""

    config: Mapping[str, ConfigValue] = field(default_factory=dict)
    inputs: tuple[tuple[int, ...], ...] = ((3, 4),)
    """Shapes per input slot."""
    indexes: int = 0
    """Inputs are integers below this, where it is not 0."""
    positive: bool = False
    """Inputs are probabilities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeType:
    """One entry of the catalogue.

    ``shape`` raises :class:`Mismatch`. ``check`` finds problems among the settings alone. ``inputs`` is the number of input
    slots, ``None`` = two or more. ``tensor`` names the parameter that an alias shares, empty where the type has none to share.
    ``kernel`` is the arithmetic; ``revision`` grows when it changes: sessions record the catalogue's digest.
    ``target`` makes it a cost: what the column that it compares its input with looks like; ``ignored`` is then the value
    of a target that does not count, ``None`` where every element does.
    ``orthogonalised``: Muon takes its matrices (and AdamW everything else).
    ``flops`` counts one row's forward; ``kept`` counts the bytes per row that backward needs besides the outputs.
    ``casts_weights``: the kernel gets its weights in the dtype that it computes in; a type whose kernel takes few rows
    of a large weight gets the weight as it is stored, and casts what it took.
    ``working`` counts what its kernel needs only while it runs, in bytes for so many rows, gradients aside.
    ``infer`` gives the builder what follows from the inputs (and from the shape of a tied weight).
    ``purpose`` and ``shapes`` (inputs -> outputs, the batch axis left out) are for people: the reference is made of them.
    ``package``: name and version of the installed package that the type comes from, empty for our own.
    """

    name: str
    purpose: str = ""
    shapes: str = ""
    aliases: tuple[str, ...] = ()
    keys: tuple[Key, ...] = ()
    inputs: int | None = 1
    outputs: Callable[[Settings], int] = _one
    shape: Callable[[Settings, Inputs], Inputs]
    kernel: Kernel
    examples: tuple[Example, ...]
    check: Callable[[Settings], tuple[str, ...]] = _no_problems
    parameters: Callable[[Settings], tuple[ParameterSpec, ...]] = _none
    tensor: str = ""
    target: Callable[[Settings, TensorSpec], TensorSpec] | None = None
    ignored: Callable[[Settings], int | None] = _every_element
    orthogonalised: bool = False
    casts_weights: bool = True
    flops: Count = _zero
    kept: Count = _zero
    working: Callable[[Settings, Inputs, int], int] = _nothing_else
    default_input: Callable[[Settings], TensorSpec | None] = _no_default_input
    infer: Callable[[Settings, Inputs, tuple[int, ...] | None], Settings] = _infer_nothing
    revision: int = 1
    package: str = ""

    @property
    def is_cost(self) -> bool:
        return self.target is not None


# --- typed reading of settings -----------------------------------------------------------------------------


def integer(settings: Settings, name: str) -> int:
    value = settings[name]
    assert isinstance(value, int)
    return value


def number(settings: Settings, name: str) -> float:
    value = settings[name]
    assert isinstance(value, int | float)
    return float(value)


def text(settings: Settings, name: str) -> str:
    value = settings[name]
    assert isinstance(value, str)
    return value


def flag(settings: Settings, name: str) -> bool:
    value = settings[name]
    assert isinstance(value, bool)
    return value


def integers(settings: Settings, name: str) -> tuple[int, ...]:
    value = settings[name]
    assert isinstance(value, tuple)
    return value


# --- precision ---------------------------------------------------------------------------------------------


def compute_dtype(settings: Settings) -> str:
    """What a node computes in: its floating inputs and its weights are cast to it, its outputs have it."""
    # Only costs have the one key; every node has the other.
    return DTYPE_OF[str(settings.get("cost_precision") or settings["activation_precision"])]


def taken(settings: Settings, inputs: Inputs) -> Inputs:
    """What a node's kernel takes for ``inputs`` that arrive: the floating ones in its own dtype."""
    wanted = compute_dtype(settings)
    if all(spec.dtype not in FLOATING or spec.dtype == wanted for spec in inputs):
        return inputs
    return tuple(replace(spec, dtype=wanted) if spec.dtype in FLOATING else spec for spec in inputs)


def from_numpy(dtype: str) -> str:
    """``dtype`` where numpy has it; float32, which holds every value of bfloat16, for that."""
    return "float32" if dtype == "bfloat16" else dtype


# --- shape rules that types share --------------------------------------------------------------------------


def expect_float(settings: Settings, found: TensorSpec) -> None:
    if found.dtype != compute_dtype(settings):
        raise Mismatch(f"found input {found}, expected dtype {compute_dtype(settings)}")


def expect_last(settings: Settings, found: TensorSpec, size: int, key: str) -> None:
    expect_float(settings, found)
    if not found.shape or found.shape[-1] != size:
        raise Mismatch(f"found input {found}, expected [.., {size}] ({key})")


def expect_dim(settings: Settings, inputs: Inputs) -> Inputs:
    """Of types that keep the shape and whose last axis is ``dim``."""
    expect_last(settings, inputs[0], integer(settings, "dim"), "dim")
    return inputs


def same_shape(settings: Settings, inputs: Inputs) -> Inputs:
    """Of elementwise types."""
    expect_float(settings, inputs[0])
    return inputs


def all_alike(settings: Settings, inputs: Inputs) -> Inputs:
    """Of elementwise types with several inputs: no tensor broadcasting."""
    for slot, found in enumerate(inputs):
        expect_float(settings, found)
        if found != inputs[0]:
            raise Mismatch(f"found input {found} at slot {slot}, expected {inputs[0]} as at slot 0")
    return inputs[:1]


def axis_of(found: TensorSpec, axis: int) -> int:
    """``axis`` counted from the front. Raises :class:`Mismatch` where the tensor has no such axis."""
    rank = len(found.shape)
    if not -rank <= axis < rank:
        raise Mismatch(f"found input {found}, expected one with axis {axis} (the batch axis is not counted)")
    return axis % rank


# --- parameters --------------------------------------------------------------------------------------------


def matrix(settings: Settings, name: str, shape: tuple[int, ...], std_key: str = "init_std") -> ParameterSpec:
    """A parameter of two or more dimensions, as ``init`` and ``init_std`` say."""
    return ParameterSpec(
        name=name,
        shape=shape,
        dtype=DTYPE_OF[text(settings, "param_precision")],
        init=text(settings, "init"),
        std=number(settings, std_key),
    )


def vector(settings: Settings, name: str, size: int, init: str) -> ParameterSpec:
    """A bias (``zeros``) or a gain (``ones``)."""
    dtype = DTYPE_OF[text(settings, "param_precision")]
    return ParameterSpec(name=name, shape=(size,), dtype=dtype, init=init, std=0.0)


# --- costs, keys -------------------------------------------------------------------------------------------


def positions(inputs: Inputs) -> int:
    """Vectors of the last axis in the first input."""
    return math.prod(inputs[0].shape[:-1])


def per_element(count: int) -> Count:
    """FLOPs of an elementwise type; transcendental functions are counted as eight."""

    def flops(_settings: Settings, inputs: Inputs, _outputs: Inputs) -> int:
        return count * sum(found.elements for found in inputs)

    return flops


def kept_copies(count: int) -> Count:
    """Backward needs as much as ``count`` times the first input."""

    def kept(_settings: Settings, inputs: Inputs, _outputs: Inputs) -> int:
        return count * inputs[0].bytes

    return kept


def infer_dim(_config: Settings, inputs: Inputs, _tied: tuple[int, ...] | None) -> Settings:
    return {"dim": inputs[0].shape[-1]} if inputs[0].shape else {}


def dimension(
    name: str,
    about: str,
    *,
    required: bool = False,
    derive: Callable[[Settings], ConfigValue] | None = None,
    derived: str = "",
) -> Key:
    return Key(
        name=name,
        kind="int",
        required=required,
        derive=derive,
        least=1,
        below=DIMENSION_MOST + 1,
        about=about,
        derived=derived,
    )


def copy_of(name: str) -> Callable[[Settings], ConfigValue]:
    return lambda settings: settings.get(name)


SEQ_LEN: Final = dimension("seq_len", "Longest sequence that it takes; any when absent.")
ROPE_THETA: Final = Key(
    name="rope_theta", kind="float", default=10000.0, least=1.0, about="Base of the rotation's angles."
)
BIAS: Final = Key(name="bias", kind="bool", default=True, about="Whether a bias is added.")
EPS: Final = Key(
    name="eps", kind="float", default=1e-5, least=0.0, about="Added under the root, against division by 0."
)
