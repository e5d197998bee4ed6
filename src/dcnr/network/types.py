"""The catalogue: what a network may be made of, one table entry per node type.

An entry says which config keys a type has, what its tensors look like, which parameters it owns and what it costs. The
arithmetic itself lives with the tensor library; adding a type means one entry here and one function there.
Shapes leave out the batch axis throughout; ``T`` is a sequence length.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from dcnr.network.graph import ConfigValue, json_bytes

Settings = Mapping[str, ConfigValue]
"""A node's config with every default filled in, values in their declared types."""

PRECISIONS: Final = ("float32", "float64")
"""What this version computes in; ``bf16`` is named by the contract and comes later."""
DTYPE_BYTES: Final[Mapping[str, int]] = {"float32": 4, "float64": 8, "int64": 8}
INIT_STD: Final = 0.02
DIMENSION_MOST: Final = 2**31 - 1
"""Largest dimension: tensor libraries index kernels with 32 bits, and a larger number is a slip of the finger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Shape without the batch axis, and dtype (``float32``, ``float64``, ``int64``)."""

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


class Mismatch(Exception):
    """What a shape rule found and what it expected; becomes one line of :class:`~dcnr.errors.InvalidNetwork`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One config key. ``default`` None means absent, unless ``derive`` computes it from the other values.

    ``later``: values that the contract names and this version does not build. ``only_default``: a key that the contract
    names and of which only the default is built.
    """

    name: str
    kind: str
    default: ConfigValue = None
    required: bool = False
    derive: Callable[[Settings], ConfigValue] | None = None
    choices: tuple[str, ...] = ()
    later: tuple[str, ...] = ()
    only_default: bool = False
    least: float | None = None
    below: float | None = None


Inputs = tuple[TensorSpec, ...]


def _one(_: Settings) -> int:
    return 1


def _none(_: Settings) -> tuple[ParameterSpec, ...]:
    return ()


def _no_problems(_: Settings) -> tuple[str, ...]:
    return ()


def _infer_nothing(_config: Settings, _inputs: Inputs, _tied: tuple[int, ...] | None) -> Settings:
    return {}


def _no_default_input(_: Settings) -> TensorSpec | None:
    return None


def _zero(_settings: Settings, _inputs: Inputs, _outputs: Inputs) -> int:
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeType:
    """One entry of the catalogue.

    ``shape`` raises :class:`Mismatch`. ``check`` finds problems among the settings alone. ``inputs`` is the number of input
    slots, ``None`` = two or more. ``tensor`` names the parameter that an alias shares, empty where the type has none to share.
    ``orthogonalised``: Muon takes its matrices (and AdamW everything else).
    ``flops`` counts one row's forward; ``kept`` counts the bytes per row that backward needs besides the outputs.
    ``infer`` gives the builder what follows from the inputs (and from the shape of a tied weight).
    ``revision`` grows when the arithmetic changes: sessions record the catalogue's digest.
    """

    name: str
    aliases: tuple[str, ...] = ()
    keys: tuple[Key, ...] = ()
    inputs: int | None = 1
    outputs: Callable[[Settings], int] = _one
    shape: Callable[[Settings, Inputs], Inputs]
    check: Callable[[Settings], tuple[str, ...]] = _no_problems
    parameters: Callable[[Settings], tuple[ParameterSpec, ...]] = _none
    tensor: str = ""
    orthogonalised: bool = False
    flops: Callable[[Settings, Inputs, Inputs], int] = _zero
    kept: Callable[[Settings, Inputs, Inputs], int] = _zero
    default_input: Callable[[Settings], TensorSpec | None] = _no_default_input
    infer: Callable[[Settings, Inputs, tuple[int, ...] | None], Settings] = _infer_nothing
    revision: int = 1


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


# --- shape rules -------------------------------------------------------------------------------------------


def _expect_float(settings: Settings, found: TensorSpec) -> None:
    if found.dtype != settings["precision"]:
        raise Mismatch(f"found input {found}, expected dtype {settings['precision']}")


def _expect_last(settings: Settings, found: TensorSpec, size: int, key: str) -> None:
    _expect_float(settings, found)
    if not found.shape or found.shape[-1] != size:
        raise Mismatch(f"found input {found}, expected [.., {size}] ({key})")


def _same(settings: Settings, inputs: Inputs) -> Inputs:
    _expect_float(settings, inputs[0])
    return inputs


def _linear_shape(settings: Settings, inputs: Inputs) -> Inputs:
    _expect_last(settings, inputs[0], integer(settings, "in_dim"), "in_dim")
    return (TensorSpec(shape=(*inputs[0].shape[:-1], integer(settings, "out_dim")), dtype=inputs[0].dtype),)


def _embedder_shape(settings: Settings, inputs: Inputs) -> Inputs:
    (found,) = inputs
    if found.dtype != "int64":
        raise Mismatch(f"found input {found}, expected dtype int64")
    limit = settings["seq_len"]
    if limit is not None and (len(found.shape) != 1 or found.shape[0] > integer(settings, "seq_len")):
        raise Mismatch(f"found input {found}, expected [T] with T <= {limit} (seq_len)")
    return (TensorSpec(shape=(*found.shape, integer(settings, "dim")), dtype=text(settings, "precision")),)


def _layernorm_shape(settings: Settings, inputs: Inputs) -> Inputs:
    _expect_last(settings, inputs[0], integer(settings, "dim"), "dim")
    return inputs


def _attention_shape(settings: Settings, inputs: Inputs) -> Inputs:
    (found,) = inputs
    _expect_last(settings, found, integer(settings, "input_dim"), "input_dim")
    limit = settings["seq_len"]
    if len(found.shape) != 2 or (limit is not None and found.shape[0] > integer(settings, "seq_len")):
        bound = "" if limit is None else f" with T <= {limit} (seq_len)"
        raise Mismatch(f"found input {found}, expected [T, {settings['input_dim']}]{bound}")
    width = integer(settings, "num_heads") * integer(settings, "head_dim")
    out = integer(settings, "dim") if flag(settings, "output_projection") else width
    return (TensorSpec(shape=(found.shape[0], out), dtype=found.dtype),)


def _broadcast_shape(settings: Settings, inputs: Inputs) -> Inputs:
    return inputs * integer(settings, "num_outputs")


def _add_shape(settings: Settings, inputs: Inputs) -> Inputs:
    for slot, found in enumerate(inputs):
        _expect_float(settings, found)
        if found != inputs[0]:
            raise Mismatch(f"found input {found} at slot {slot}, expected {inputs[0]} as at slot 0")
    return inputs[:1]


def _cost_shape(settings: Settings, inputs: Inputs) -> Inputs:
    (found,) = inputs
    _expect_float(settings, found)
    for key in ("vocab_size", "in_dim"):
        if settings[key] is not None:
            _expect_last(settings, found, integer(settings, key), key)
    if settings["cost_function"] == "ce_logits" and not found.shape:
        raise Mismatch(f"found input {found}, expected [.., classes]")
    return (TensorSpec(shape=(), dtype=found.dtype),)


def cost_target(settings: Settings, found: TensorSpec) -> TensorSpec:
    """What a cost compares its input with: class indexes for cross entropy, the same tensor for mse."""
    if settings["cost_function"] == "ce_logits":
        return TensorSpec(shape=found.shape[:-1], dtype="int64")
    return found


# --- parameters --------------------------------------------------------------------------------------------


def _matrix(settings: Settings, name: str, shape: tuple[int, ...], std_key: str = "init_std") -> ParameterSpec:
    return ParameterSpec(
        name=name,
        shape=shape,
        dtype=text(settings, "precision"),
        init=text(settings, "init"),
        std=number(settings, std_key),
    )


def _vector(settings: Settings, name: str, size: int, init: str) -> ParameterSpec:
    return ParameterSpec(name=name, shape=(size,), dtype=text(settings, "precision"), init=init, std=0.0)


def _linear_parameters(settings: Settings) -> tuple[ParameterSpec, ...]:
    rows, columns = integer(settings, "out_dim"), integer(settings, "in_dim")
    weight = _matrix(settings, "weight", (rows, columns))
    return (weight, _vector(settings, "bias", rows, "zeros")) if settings["bias"] else (weight,)


def _embedder_parameters(settings: Settings) -> tuple[ParameterSpec, ...]:
    dim = integer(settings, "dim")
    weight = _matrix(settings, "weight", (integer(settings, "vocab_size"), dim))
    if settings["position_encoding"] == "learned":
        return (weight, _matrix(settings, "position.weight", (integer(settings, "seq_len"), dim)))
    return (weight,)


def _layernorm_parameters(settings: Settings) -> tuple[ParameterSpec, ...]:
    dim = integer(settings, "dim")
    weight = _vector(settings, "weight", dim, "ones")
    return (weight, _vector(settings, "bias", dim, "zeros")) if settings["bias"] else (weight,)


def _attention_parameters(settings: Settings) -> tuple[ParameterSpec, ...]:
    columns, head = integer(settings, "input_dim"), integer(settings, "head_dim")
    width, narrow = integer(settings, "num_heads") * head, integer(settings, "num_kv_heads") * head
    found: list[ParameterSpec] = []
    for name, rows in (("q", width), ("k", narrow), ("v", narrow)):
        found.append(_matrix(settings, f"{name}.weight", (rows, columns)))
        if settings["qkv_bias"]:
            found.append(_vector(settings, f"{name}.bias", rows, "zeros"))
    if settings["output_projection"]:
        rows = integer(settings, "dim")
        found.append(_matrix(settings, "o.weight", (rows, width), "output_init_std"))
        if settings["out_bias"]:
            found.append(_vector(settings, "o.bias", rows, "zeros"))
    return tuple(found)


# --- checks of settings, costs, inference -------------------------------------------------------------------


def _embedder_check(settings: Settings) -> tuple[str, ...]:
    if settings["position_encoding"] == "learned" and settings["seq_len"] is None:
        return ("config key 'seq_len': found nothing, expected it with position_encoding learned",)
    return ()


def _attention_check(settings: Settings) -> tuple[str, ...]:
    problems: list[str] = []
    heads, narrow, head, dim = (integer(settings, key) for key in ("num_heads", "num_kv_heads", "head_dim", "dim"))
    if heads % narrow:
        problems.append(f"config key 'num_kv_heads': found {narrow}, expected a divisor of num_heads {heads}")
    if settings["position_encoding"] == "rope" and head % 2:
        problems.append(f"config key 'head_dim': found {head}, expected an even number with position_encoding rope")
    if not settings["output_projection"] and dim != heads * head:
        problems.append(
            f"config key 'dim': found {dim}, expected num_heads * head_dim = {heads * head} without output_projection"
        )
    return tuple(problems)


def _whole_head(settings: Settings) -> ConfigValue:
    dim, heads = settings.get("dim"), settings.get("num_heads")
    if isinstance(dim, int) and isinstance(heads, int) and heads > 0 and dim % heads == 0:
        return dim // heads
    return None


def _positions(inputs: Inputs) -> int:
    return math.prod(inputs[0].shape[:-1])


def _linear_flops(_: Settings, inputs: Inputs, outputs: Inputs) -> int:
    return 2 * inputs[0].elements * outputs[0].shape[-1]


def _attention_flops(settings: Settings, inputs: Inputs, _: Inputs) -> int:
    steps = inputs[0].shape[0]
    width = integer(settings, "num_heads") * integer(settings, "head_dim")
    projections = sum(math.prod(p.shape) for p in _attention_parameters(settings) if len(p.shape) == 2)
    scores = 4 * steps * steps * width
    return 2 * steps * projections + (scores // 2 if settings["causal"] else scores)


def _attention_kept(settings: Settings, inputs: Inputs, _: Inputs) -> int:
    """q, k, v before and after the rotation, the heads' output and the softmax's log-sums."""
    width = (2 * integer(settings, "num_heads") + 2 * integer(settings, "num_kv_heads")) * integer(settings, "head_dim")
    rotated = 2 if settings["position_encoding"] == "rope" else 1
    per_position = rotated * width + integer(settings, "num_heads")
    return inputs[0].shape[0] * per_position * DTYPE_BYTES[inputs[0].dtype]


def _per_element(count: int) -> Callable[[Settings, Inputs, Inputs], int]:
    """FLOPs of an elementwise type; transcendental functions are counted as eight."""

    def flops(_settings: Settings, inputs: Inputs, _outputs: Inputs) -> int:
        return count * sum(found.elements for found in inputs)

    return flops


def _kept_copies(count: int) -> Callable[[Settings, Inputs, Inputs], int]:
    def kept(_settings: Settings, inputs: Inputs, _outputs: Inputs) -> int:
        return count * inputs[0].bytes

    return kept


def _linear_infer(config: Settings, inputs: Inputs, tied: tuple[int, ...] | None) -> Settings:
    known: dict[str, ConfigValue] = {"in_dim": inputs[0].shape[-1]} if inputs[0].shape else {}
    if tied is not None:
        known["out_dim"] = tied[0]
    return known


def _dim_infer(config: Settings, inputs: Inputs, tied: tuple[int, ...] | None) -> Settings:
    return {"dim": inputs[0].shape[-1]} if inputs[0].shape else {}


def _attention_infer(config: Settings, inputs: Inputs, tied: tuple[int, ...] | None) -> Settings:
    shape = inputs[0].shape
    if len(shape) != 2:
        return {}
    return {"dim": shape[-1], "input_dim": shape[-1], "seq_len": shape[0]}


def _embedder_infer(config: Settings, inputs: Inputs, tied: tuple[int, ...] | None) -> Settings:
    known: dict[str, ConfigValue] = {"seq_len": inputs[0].shape[0]} if len(inputs[0].shape) == 1 else {}
    if tied is not None:
        known |= {"vocab_size": tied[0], "dim": tied[1]}
    return known


def _tokens(settings: Settings) -> TensorSpec | None:
    if settings["seq_len"] is None:
        return None
    return TensorSpec(shape=(integer(settings, "seq_len"),), dtype="int64")


# --- the table ---------------------------------------------------------------------------------------------


def _dimension(name: str, *, required: bool = False, derive: Callable[[Settings], ConfigValue] | None = None) -> Key:
    return Key(name=name, kind="int", required=required, derive=derive, least=1, below=DIMENSION_MOST + 1)


def _copy_of(name: str) -> Callable[[Settings], ConfigValue]:
    return lambda settings: settings.get(name)


POLICIES: Final = ("required", "preferred")
OPTIMIZER_KEYS: Final = ("optimizer", "lr_scale", "weight_decay", "trainable", "init", "init_std", "output_init_std")
"""Belong to the owner of a weight; a node that uses another's weight must not have them."""

COMMON_KEYS: Final[tuple[Key, ...]] = (
    Key(name="optimizer", kind="str", choices=("adam", "adamw", "sgd", "muon")),
    Key(name="lr_scale", kind="float", default=1.0, least=0.0),
    Key(name="weight_decay", kind="float", least=0.0),
    Key(name="trainable", kind="bool", default=True),
    # ``init`` and ``init_std`` are about parameters of two or more dimensions; biases start at 0, gains at 1.
    Key(name="init", kind="str", default="normal", choices=("normal", "zeros")),
    Key(name="init_std", kind="float", default=INIT_STD, least=0.0),
    Key(name="precision", kind="str", choices=PRECISIONS, later=("bf16",)),
    Key(name="param_precision", kind="str", choices=PRECISIONS, later=("bf16",)),
    Key(name="activation_precision", kind="str", choices=PRECISIONS, later=("bf16",)),
    Key(name="colocate_group", kind="str"),
    Key(name="colocate_policy", kind="str", choices=POLICIES),
    Key(name="shared_weight_alias", kind="str"),
    Key(name="tie_weight_alias", kind="str"),
)
PRECISION_KEYS: Final = ("precision", "param_precision", "activation_precision", "cost_precision")
"""One precision per network in this version: these may only repeat it."""

_SEQ_LEN = _dimension("seq_len")
_ROPE_THETA = Key(name="rope_theta", kind="float", default=10000.0, least=1.0)
_BIAS = Key(name="bias", kind="bool", default=True)

_TYPES: tuple[NodeType, ...] = (
    NodeType(
        name="linear",
        aliases=("dense",),
        keys=(_dimension("in_dim", required=True), _dimension("out_dim", required=True), _BIAS),
        shape=_linear_shape,
        parameters=_linear_parameters,
        tensor="weight",
        orthogonalised=True,
        flops=_linear_flops,
        infer=_linear_infer,
    ),
    NodeType(
        name="embedder",
        keys=(
            _dimension("vocab_size", required=True),
            _dimension("dim", required=True),
            _SEQ_LEN,
            # ``rope`` declares that the attention nodes rotate; the embedder itself then adds nothing, as with ``none``.
            Key(name="position_encoding", kind="str", default="learned", choices=("learned", "rope", "none")),
            _ROPE_THETA,
        ),
        shape=_embedder_shape,
        check=_embedder_check,
        parameters=_embedder_parameters,
        tensor="weight",
        flops=lambda _settings, _inputs, outputs: outputs[0].elements,
        default_input=_tokens,
        infer=_embedder_infer,
    ),
    NodeType(
        name="layernorm",
        keys=(_dimension("dim", required=True), Key(name="eps", kind="float", default=1e-5, least=0.0), _BIAS),
        shape=_layernorm_shape,
        parameters=_layernorm_parameters,
        flops=_per_element(8),
        kept=lambda _settings, inputs, _outputs: 2 * _positions(inputs) * DTYPE_BYTES[inputs[0].dtype],
        infer=_dim_infer,
    ),
    NodeType(
        name="attention",
        aliases=("multiheadattention",),
        keys=(
            _dimension("num_heads", required=True),
            _dimension("dim", required=True),
            _dimension("num_kv_heads", derive=_copy_of("num_heads")),
            _dimension("head_dim", required=True, derive=_whole_head),
            _dimension("input_dim", derive=_copy_of("dim")),
            _SEQ_LEN,
            Key(name="causal", kind="bool", default=True),
            Key(name="position_encoding", kind="str", default="rope", choices=("rope", "none")),
            _ROPE_THETA,
            Key(name="output_projection", kind="bool", default=True),
            Key(name="qkv_bias", kind="bool", default=False),
            Key(name="out_bias", kind="bool", default=True),
            # The residual projection has its own key, since ``init_std`` is about q, k and v too.
            Key(name="output_init_std", kind="float", derive=_copy_of("init_std"), least=0.0),
            Key(name="rope_scaling", kind="str", default="none", only_default=True),
            Key(name="qk_norm", kind="str", default="none", only_default=True),
            Key(name="window", kind="str", default="none", only_default=True),
        ),
        shape=_attention_shape,
        check=_attention_check,
        parameters=_attention_parameters,
        orthogonalised=True,
        flops=_attention_flops,
        kept=_attention_kept,
        infer=_attention_infer,
    ),
    NodeType(
        name="gelu",
        keys=(Key(name="approximate", kind="str", default="none", choices=("none", "tanh")),),
        shape=_same,
        flops=_per_element(8),
    ),
    NodeType(name="relu", shape=_same, flops=_per_element(1)),
    NodeType(
        name="dropout",
        keys=(Key(name="rate", kind="float", default=0.1, least=0.0, below=1.0),),
        shape=_same,
        flops=_per_element(2),
        kept=_kept_copies(1),
    ),
    NodeType(
        name="broadcast",
        keys=(Key(name="num_outputs", kind="int", default=2, least=1, below=65537),),
        outputs=lambda settings: integer(settings, "num_outputs"),
        shape=_broadcast_shape,
    ),
    NodeType(name="add", inputs=None, shape=_add_shape, flops=_per_element(1)),
    NodeType(
        name="cost",
        keys=(
            Key(name="cost_function", kind="str", required=True, choices=("mse", "ce_logits"), later=("ce",)),
            _dimension("vocab_size"),
            _dimension("in_dim"),
            Key(name="ignore_index", kind="int", default=-100),
            Key(name="cost_precision", kind="str", choices=PRECISIONS, later=("bf16",)),
            Key(name="label_smoothing", kind="float", default=0.0, only_default=True),
            Key(name="z_loss", kind="float", default=0.0, only_default=True),
        ),
        shape=_cost_shape,
        flops=_per_element(8),
        kept=_kept_copies(1),
    ),
)

CATALOGUE: Final[Mapping[str, NodeType]] = {kind.name: kind for kind in _TYPES}
_BY_ANY_NAME: Final[Mapping[str, NodeType]] = {name: kind for kind in _TYPES for name in (kind.name, *kind.aliases)}

_LATER: Final = (
    *(
        "rmsnorm",
        "attention_head",
        "singleheadattention",
        "tied_lm_head_ce",
        "fusedlmheadce",
        "silu",
        "tanh",
        "sigmoid",
    ),
    *(
        "softmax",
        "swiglu",
        "stack",
        "concat",
        "multiply",
        "matmul",
        "scale",
        "reshape",
        "transpose",
        "slice",
        "flatten",
    ),
    "mask",
)
"""Types that the contract names and this version does not build."""


def find_type(name: str) -> NodeType | str:
    """The entry of a type's name or alias, else what is wrong with the name."""
    known = _BY_ANY_NAME.get(name)
    if known is not None:
        return known
    if name in ("tokenizer", "detokenizer"):
        return "tokenizers belong to datasets: dcnr data add --tokenizer"
    if name in _LATER:
        return f"unknown type: found {name!r}, which is not in this version; expected one of {', '.join(CATALOGUE)}"
    return f"unknown type: found {name!r}, expected {nearest(name, tuple(_BY_ANY_NAME))}"


def orthogonalised(type_name: str, parameter: ParameterSpec) -> bool:
    """Whether Muon, where it is a node's optimizer, takes this parameter; AdamW takes the others."""
    return CATALOGUE[type_name].orthogonalised and len(parameter.shape) == 2


def nearest(name: str, known: tuple[str, ...]) -> str:
    """What may have been meant, else everything that could be."""
    close = difflib.get_close_matches(name, known, n=1)
    return repr(close[0]) if close else f"one of {', '.join(known)}"


# --- config values -----------------------------------------------------------------------------------------


def _convert(key: Key, value: str | int | float | bool) -> ConfigValue:
    """A value in the key's declared type. Raises ``ValueError`` naming what was expected."""
    match key.kind:
        case "bool":
            if isinstance(value, bool):
                return value
            if isinstance(value, str) and value.lower() in ("true", "false"):
                return value.lower() == "true"
            raise ValueError("true or false")
        case "int":
            if isinstance(value, str) and len(value) <= 20 and value.removeprefix("-").isdecimal() and value.isascii():
                value = int(value)
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError("an integer")
            return value
        case "float":
            if isinstance(value, bool):
                raise ValueError("a number")
            try:
                result = float(value)
            except (ValueError, OverflowError):
                raise ValueError("a number") from None
            if not math.isfinite(result):
                raise ValueError("a finite number")
            return result
        case _:
            if not isinstance(value, str):
                raise ValueError("a string")
            if not value:
                raise ValueError("a string that is not empty")
            return value


def _checked(key: Key, value: ConfigValue) -> ConfigValue:
    """``value`` converted and within the key's range. Raises ``ValueError`` with the found and the expected."""
    assert value is not None
    if isinstance(value, str) and value in key.later:
        raise ValueError(f"found {value!r}, which is not in this version; expected one of {', '.join(key.choices)}")
    try:
        result = _convert(key, value)
    except ValueError as error:
        if key.only_default:
            raise ValueError(f"found {value!r}, which is not in this version; expected {key.default!r}") from None
        raise ValueError(f"found {value!r}, expected {error}") from None
    if key.only_default and result != key.default:
        raise ValueError(f"found {value!r}, which is not in this version; expected {key.default!r}")
    if key.choices and result not in key.choices:
        raise ValueError(f"found {value!r}, expected one of {', '.join(key.choices)}")
    if isinstance(result, int | float) and not isinstance(result, bool):
        if key.least is not None and result < key.least:
            raise ValueError(f"found {value!r}, expected at least {key.least:g}")
        if key.below is not None and result >= key.below:
            raise ValueError(f"found {value!r}, expected less than {key.below:g}")
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalised:
    """A node's config made canonical. ``settings`` are usable only where ``problems`` is empty."""

    config: Settings
    """Declared types, defaults left out: what the network's id is made of."""
    settings: Settings
    problems: tuple[str, ...]


def normalise_config(kind: NodeType, config: Mapping[str, ConfigValue], precision: str) -> Normalised:
    """Convert strings, check every key, drop defaults, fill defaults into the settings.

    ``settings["precision"]`` is the network's dtype. A value of ``None`` is an absent key.
    """
    keys = {key.name: key for key in (*kind.keys, *COMMON_KEYS)}
    problems: list[str] = []
    given: dict[str, ConfigValue] = {}
    refused: set[str] = set()
    for name, value in config.items():
        key = keys.get(name)
        if key is None:
            expected = nearest(name, tuple(k.name for k in kind.keys) + tuple(k.name for k in COMMON_KEYS))
            problems.append(f"unknown config key: found {name!r}, expected {expected}")
            continue
        if value is None:
            continue
        try:
            given[name] = _checked(key, value)
        except ValueError as error:
            refused.add(name)
            problems.append(f"config key {name!r}: {error}")
    settings: dict[str, ConfigValue] = {key.name: given.get(key.name, key.default) for key in keys.values()}
    canonical: dict[str, ConfigValue] = {}
    for key in keys.values():
        default = key.default if key.derive is None else key.derive(settings)
        if settings[key.name] is None:
            settings[key.name] = default
        if settings[key.name] is None and key.required and key.name not in refused:
            problems.append(f"config key {key.name!r}: found nothing, expected {_described(key)}")
        if key.name in given and given[key.name] != default:
            canonical[key.name] = given[key.name]
    for name in PRECISION_KEYS:
        if canonical.pop(name, precision) != precision:
            problems.append(
                f"config key {name!r}: found {given[name]!r}, which is not in this version; "
                f"expected the network's precision {precision!r}"
            )
    settings["precision"] = precision
    if settings["colocate_policy"] is None:
        settings["colocate_policy"] = "preferred"
    elif settings["colocate_group"] is None:
        problems.append("config key 'colocate_policy': found it without colocate_group, expected both")
    if canonical.get("colocate_policy") == "preferred":
        del canonical["colocate_policy"]
    if not problems:
        problems.extend(kind.check(settings))
    return Normalised(config=canonical, settings=settings, problems=tuple(problems))


def _described(key: Key) -> str:
    if key.choices:
        return f"one of {', '.join(key.choices)}"
    return {"int": "an integer", "float": "a number", "bool": "true or false"}.get(key.kind, "a string")


def catalogue_digest() -> str:
    """sha256 of the catalogue's canonical description: a session records which catalogue computed it."""
    description = {
        "common": [_key_description(key) for key in COMMON_KEYS],
        "types": [
            {
                "name": kind.name,
                "aliases": list(kind.aliases),
                "inputs": kind.inputs,
                "orthogonalised": kind.orthogonalised,
                "keys": [_key_description(key) for key in kind.keys],
                "revision": kind.revision,
            }
            for kind in _TYPES
        ],
    }
    return hashlib.sha256(json_bytes(description)).hexdigest()


def _key_description(key: Key) -> dict[str, ConfigValue | list[str]]:
    return {
        "name": key.name,
        "kind": key.kind,
        "default": key.default,
        "required": key.required,
        "derived": key.derive is not None,
        "choices": list(key.choices),
    }
