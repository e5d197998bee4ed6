"""Positions that look at each other: attention, attention_head, mask."""

from __future__ import annotations

import math

from dcnr.network.graph import ConfigValue
from dcnr.network.node_type import (
    DTYPE_BYTES,
    ROPE_THETA,
    SEQ_LEN,
    Call,
    Example,
    Inputs,
    Key,
    Library,
    Mismatch,
    NodeType,
    ParameterSpec,
    Settings,
    Tensor,
    Tensors,
    TensorSpec,
    Weights,
    copy_of,
    dimension,
    expect_float,
    expect_last,
    flag,
    integer,
    matrix,
    number,
    per_element,
    text,
    vector,
)


def _expect_sequence(settings: Settings, found: TensorSpec) -> None:
    expect_last(settings, found, integer(settings, "input_dim"), "input_dim")
    limit = settings["seq_len"]
    if len(found.shape) != 2 or (limit is not None and found.shape[0] > integer(settings, "seq_len")):
        bound = "" if limit is None else f" with T <= {limit} (seq_len)"
        raise Mismatch(f"found input {found}, expected [T, {settings['input_dim']}]{bound}")


def _scores(settings: Settings, steps: int, width: int) -> int:
    """FLOPs of the products with the keys and with the values. Causal kernels skip what lies ahead; a window is a mask, and
    kernels that take one compute all."""
    skipped = bool(settings["causal"]) and settings.get("window") is None
    return 4 * steps * steps * width // (2 if skipped else 1)


def _part(
    lib: Library, tensor: Tensor, weights: Weights, name: str, heads: int, settings: Settings, scaling: float = 1.0
) -> Tensor:
    """``q``, ``k`` or ``v`` of [rows, T, input_dim] as [rows, T, heads, head_dim], normalised and rotated."""
    size = integer(settings, "head_dim")
    made = lib.functional.linear(tensor, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
    part = made.view(*tensor.shape[:2], heads, size)
    gain = weights.get(f"{name}_norm.weight")
    if gain is not None:
        part = lib.functional.rms_norm(part, (size,), gain, _QK_EPS)
    if name != "v" and text(settings, "position_encoding") == "rope":
        part = lib.rotate(part, number(settings, "rope_theta"), scaling)
    return part


def _looked_at(lib: Library, length: int, window: int, *, causal: bool) -> Tensor:
    """Booleans [T, T]: the key (column) lies within the window of the query (row)."""
    place = lib.torch.arange(length)
    distance = place.unsqueeze(1) - place
    return (distance < window) & ((distance >= 0) if causal else (distance > -window))


# --- attention ---------------------------------------------------------------------------------------------


def _attention_shape(settings: Settings, inputs: Inputs) -> Inputs:
    (found,) = inputs
    _expect_sequence(settings, found)
    width = integer(settings, "num_heads") * integer(settings, "head_dim")
    out = integer(settings, "dim") if flag(settings, "output_projection") else width
    return (TensorSpec(shape=(found.shape[0], out), dtype=found.dtype),)


def _attention_check(settings: Settings) -> tuple[str, ...]:
    problems: list[str] = []
    heads, narrow, head, dim = (integer(settings, key) for key in ("num_heads", "num_kv_heads", "head_dim", "dim"))
    if heads % narrow:
        problems.append(f"config key 'num_kv_heads': found {narrow}, expected a divisor of num_heads {heads}")
    problems.extend(_rotation_check(settings))
    if settings["rope_scaling"] is not None and settings["position_encoding"] != "rope":
        problems.append("config key 'rope_scaling': found it without position_encoding rope, expected both")
    if not settings["output_projection"] and dim != heads * head:
        problems.append(
            f"config key 'dim': found {dim}, expected num_heads * head_dim = {heads * head} without output_projection"
        )
    return tuple(problems)


def _rotation_check(settings: Settings) -> tuple[str, ...]:
    head = integer(settings, "head_dim")
    if settings["position_encoding"] == "rope" and head % 2:
        return (f"config key 'head_dim': found {head}, expected an even number with position_encoding rope",)
    return ()


def _attention_parameters(settings: Settings) -> tuple[ParameterSpec, ...]:
    columns, head = integer(settings, "input_dim"), integer(settings, "head_dim")
    width, narrow = integer(settings, "num_heads") * head, integer(settings, "num_kv_heads") * head
    found: list[ParameterSpec] = []
    for name, rows in (("q", width), ("k", narrow), ("v", narrow)):
        found.append(matrix(settings, f"{name}.weight", (rows, columns)))
        if settings["qkv_bias"]:
            found.append(vector(settings, f"{name}.bias", rows, "zeros"))
    if settings["qk_norm"] == "rms":
        found.extend(vector(settings, f"{name}_norm.weight", head, "ones") for name in "qk")
    if settings["output_projection"]:
        rows = integer(settings, "dim")
        found.append(matrix(settings, "o.weight", (rows, width), "output_init_std"))
        if settings["out_bias"]:
            found.append(vector(settings, "o.bias", rows, "zeros"))
    return tuple(found)


def _attention(lib: Library, inputs: Tensors, weights: Weights, call: Call) -> Tensors:
    settings = call.settings
    heads, narrow = integer(settings, "num_heads"), integer(settings, "num_kv_heads")
    scaling = 1.0 if settings["rope_scaling"] is None else number(settings, "rope_scaling")
    rows, length, _ = inputs[0].shape
    counts = {"q": heads, "k": narrow, "v": narrow}
    q, k, v = (
        _part(lib, tensor, weights, name, counts[name], settings, scaling).transpose(1, 2)
        for name, tensor in zip("qkv", lib.fan_out(inputs[0], 3), strict=True)
    )
    causal, seen = flag(settings, "causal"), None
    if settings["window"] is not None:
        causal, seen = False, _looked_at(lib, length, integer(settings, "window"), causal=causal)
    mixed = lib.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=causal, enable_gqa=narrow != heads
    )
    found = mixed.transpose(1, 2).reshape(rows, length, heads * integer(settings, "head_dim"))
    if flag(settings, "output_projection"):
        found = lib.functional.linear(found, weights["o.weight"], weights.get("o.bias"))
    return (found,)


def _attention_flops(settings: Settings, inputs: Inputs, _: Inputs) -> int:
    steps = inputs[0].shape[0]
    width = integer(settings, "num_heads") * integer(settings, "head_dim")
    projections = sum(math.prod(p.shape) for p in _attention_parameters(settings) if len(p.shape) == 2)
    return 2 * steps * projections + _scores(settings, steps, width)


def _attention_kept(settings: Settings, inputs: Inputs, _: Inputs) -> int:
    """q, k, v before and after norm and rotation, the heads' output and the softmax's log-sums; with a window, which no
    fused kernel takes, the scores too."""
    heads, steps = integer(settings, "num_heads"), inputs[0].shape[0]
    width = (2 * heads + 2 * integer(settings, "num_kv_heads")) * integer(settings, "head_dim")
    copies = 1 + (settings["position_encoding"] == "rope") + (settings["qk_norm"] == "rms")
    scores = steps * heads if settings["window"] is not None else heads
    return steps * (copies * width + scores) * DTYPE_BYTES[inputs[0].dtype]


def _attention_infer(_config: Settings, inputs: Inputs, _tied: tuple[int, ...] | None) -> Settings:
    shape = inputs[0].shape
    if len(shape) != 2:
        return {}
    return {"dim": shape[-1], "input_dim": shape[-1], "seq_len": shape[0]}


def _whole_head(settings: Settings) -> ConfigValue:
    dim, heads = settings.get("dim"), settings.get("num_heads")
    if isinstance(dim, int) and isinstance(heads, int) and heads > 0 and dim % heads == 0:
        return dim // heads
    return None


# --- attention_head ----------------------------------------------------------------------------------------


def _head_shape(settings: Settings, inputs: Inputs) -> Inputs:
    (found,) = inputs
    _expect_sequence(settings, found)
    return (TensorSpec(shape=(found.shape[0], integer(settings, "head_dim")), dtype=found.dtype),)


def _head_parameters(settings: Settings) -> tuple[ParameterSpec, ...]:
    rows, columns = integer(settings, "head_dim"), integer(settings, "input_dim")
    found: list[ParameterSpec] = []
    for name in "qkv":
        found.append(matrix(settings, f"{name}.weight", (rows, columns)))
        if settings["bias"]:
            found.append(vector(settings, f"{name}.bias", rows, "zeros"))
    return tuple(found)


def _head(lib: Library, inputs: Tensors, weights: Weights, call: Call) -> Tensors:
    q, k, v = (
        _part(lib, tensor, weights, name, 1, call.settings).transpose(1, 2)
        for name, tensor in zip("qkv", lib.fan_out(inputs[0], 3), strict=True)
    )
    mixed = lib.functional.scaled_dot_product_attention(q, k, v, is_causal=flag(call.settings, "causal"))
    return (mixed.squeeze(1),)


def _head_flops(settings: Settings, inputs: Inputs, _: Inputs) -> int:
    steps, head = inputs[0].shape[0], integer(settings, "head_dim")
    return 6 * inputs[0].elements * head + _scores(settings, steps, head)


def _head_kept(settings: Settings, inputs: Inputs, _: Inputs) -> int:
    copies = 2 if settings["position_encoding"] == "rope" else 1
    per_position = copies * 3 * integer(settings, "head_dim") + 1
    return inputs[0].shape[0] * per_position * DTYPE_BYTES[inputs[0].dtype]


def _head_infer(_config: Settings, inputs: Inputs, _tied: tuple[int, ...] | None) -> Settings:
    shape = inputs[0].shape
    return {"input_dim": shape[-1], "seq_len": shape[0]} if len(shape) == 2 else {}


# --- mask --------------------------------------------------------------------------------------------------


def _mask_shape(settings: Settings, inputs: Inputs) -> Inputs:
    (found,) = inputs
    expect_float(settings, found)
    if len(found.shape) < 2 or found.shape[-1] != found.shape[-2]:
        raise Mismatch(f"found input {found}, expected [.., T, T]")
    return inputs


def _mask_check(settings: Settings) -> tuple[str, ...]:
    precision = settings["activation_precision"] or settings["precision"]
    most = MASK_MOST.get(str(precision), math.inf)
    if abs(number(settings, "mask_val")) > most:
        return (f"config key 'mask_val': found {settings['mask_val']}, expected at most {most:g} away from 0",)
    return ()


def _mask(lib: Library, inputs: Tensors, _: Weights, call: Call) -> Tensors:
    """The random part is a fixed pattern, the same in training and outside; a position always sees itself."""
    settings, (x,) = call.settings, inputs
    length, rate = x.shape[-1], number(settings, "random_prob")
    hidden = lib.torch.zeros(length, length, dtype=lib.torch.bool)
    if flag(settings, "causal"):
        hidden |= lib.torch.ones_like(hidden).triu(1)
    if rate:
        hidden |= lib.fixed_pattern(integer(settings, "seed"), length, rate) & ~lib.torch.eye(
            length, dtype=hidden.dtype
        )
    return (x.masked_fill(hidden, number(settings, "mask_val")),)


MASK_MOST = {"float32": 3.4028234663852886e38, "bf16": 3.3895313892515355e38}
"""The largest number of a precision: torch refuses to fill with a larger one."""
_QK_EPS = 1e-6
"""Of the norm of queries and keys, as the models that have one use it."""
_CAUSAL = Key(name="causal", kind="bool", default=True, about="A position sees none after it.")
_POSITION_ENCODING = Key(
    name="position_encoding",
    kind="str",
    default="rope",
    choices=("rope", "none"),
    about="`rope` rotates queries and keys by their positions (Su et al., 2021).",
)

TYPES = (
    NodeType(
        name="attention",
        purpose="All heads of an attention with its four projections (Vaswani et al., 2017).",
        shapes="[T, input_dim] -> [T, dim]",
        aliases=("multiheadattention",),
        keys=(
            dimension("num_heads", "Heads of queries.", required=True),
            dimension("dim", "Size of the output's last axis.", required=True),
            dimension(
                "num_kv_heads",
                "Heads of keys and values, a divisor of `num_heads` (Ainslie et al., 2023).",
                derive=copy_of("num_heads"),
                derived="`num_heads`",
            ),
            dimension(
                "head_dim", "Size of a head.", required=True, derive=_whole_head, derived="`dim` / `num_heads` if whole"
            ),
            dimension("input_dim", "Size of the input's last axis.", derive=copy_of("dim"), derived="`dim`"),
            SEQ_LEN,
            _CAUSAL,
            _POSITION_ENCODING,
            ROPE_THETA,
            Key(
                name="rope_scaling",
                kind="float",
                none=True,
                least=1.0,
                about="Positions are divided by it (linear scaling, Chen et al., 2023); needs `rope`.",
            ),
            Key(
                name="output_projection",
                kind="bool",
                default=True,
                about="Without it `dim` is `num_heads` * `head_dim`.",
            ),
            Key(name="qkv_bias", kind="bool", default=False, about="Biases of queries, keys and values."),
            Key(name="out_bias", kind="bool", default=True, about="A bias of the output projection."),
            Key(
                name="output_init_std",
                kind="float",
                derive=copy_of("init_std"),
                least=0.0,
                derived="`init_std`",
                about="Of the output projection, which residual networks begin smaller than the others.",
            ),
            Key(
                name="qk_norm",
                kind="str",
                default="none",
                choices=("none", "rms"),
                about="Normalises each head's queries and keys before the rotation, with a gain (Henry et al., 2020).",
            ),
            Key(
                name="window",
                kind="int",
                none=True,
                least=1,
                about="A position sees so many newest, itself included (Beltagy et al., 2020); all when absent.",
            ),
        ),
        shape=_attention_shape,
        kernel=_attention,
        examples=(
            Example(config={"num_heads": 2, "dim": 8}, inputs=((5, 8),)),
            Example(
                config={"num_heads": 4, "num_kv_heads": 2, "head_dim": 2, "dim": 6, "input_dim": 3, "qkv_bias": True},
                inputs=((5, 3),),
            ),
            Example(
                config={
                    "num_heads": 2,
                    "dim": 4,
                    "causal": False,
                    "position_encoding": "none",
                    "output_projection": False,
                },
                inputs=((5, 4),),
            ),
            Example(
                config={"num_heads": 2, "dim": 8, "qk_norm": "rms", "window": 2, "rope_scaling": 4.0},
                inputs=((5, 8),),
            ),
            Example(config={"num_heads": 1, "dim": 4, "window": 2, "causal": False}, inputs=((5, 4),)),
        ),
        check=_attention_check,
        parameters=_attention_parameters,
        orthogonalised=True,
        flops=_attention_flops,
        kept=_attention_kept,
        infer=_attention_infer,
    ),
    NodeType(
        name="attention_head",
        purpose="One head of an attention, without an output projection.",
        shapes="[T, input_dim] -> [T, head_dim]",
        aliases=("singleheadattention",),
        keys=(
            dimension("input_dim", "Size of the input's last axis.", required=True),
            dimension("head_dim", "Size of the head.", required=True),
            SEQ_LEN,
            _CAUSAL,
            _POSITION_ENCODING,
            ROPE_THETA,
            Key(name="bias", kind="bool", default=False, about="Biases of queries, keys and values."),
        ),
        shape=_head_shape,
        kernel=_head,
        examples=(
            Example(config={"input_dim": 6, "head_dim": 4}, inputs=((5, 6),)),
            Example(
                config={
                    "input_dim": 6,
                    "head_dim": 3,
                    "causal": False,
                    "position_encoding": "none",
                    "bias": True,
                },
                inputs=((5, 6),),
            ),
        ),
        check=_rotation_check,
        parameters=_head_parameters,
        orthogonalised=True,
        flops=_head_flops,
        kept=_head_kept,
        infer=_head_infer,
    ),
    NodeType(
        name="mask",
        purpose="Scores of an attention with hidden positions overwritten.",
        shapes="[.., T, T] -> [.., T, T]",
        keys=(
            _CAUSAL,
            Key(name="mask_val", kind="float", default=-1e9, about="What hidden positions get."),
            Key(
                name="random_prob",
                kind="float",
                default=0.0,
                least=0.0,
                below=1.0,
                about="Share of positions hidden besides, by a pattern that never changes.",
            ),
            Key(name="seed", kind="int", default=0, least=0, below=2**63, about="Of that pattern."),
        ),
        check=_mask_check,
        shape=_mask_shape,
        kernel=_mask,
        examples=(
            Example(inputs=((2, 4, 4),)),
            Example(config={"causal": False, "random_prob": 0.5, "mask_val": -3.0, "seed": 5}, inputs=((4, 4),)),
        ),
        flops=per_element(1),
        kept=lambda _settings, inputs, _outputs: math.prod(inputs[0].shape[-2:]),
    ),
)
