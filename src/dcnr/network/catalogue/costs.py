"""What is minimised: cost, and tied_lm_head_ce, which is a head and its cost in one."""

from __future__ import annotations

from dcnr.network.graph import ConfigValue
from dcnr.network.node_type import (
    DTYPE_BYTES,
    DTYPE_OF,
    HEAD_CHUNK,
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
    dimension,
    expect_float,
    expect_last,
    from_numpy,
    integer,
    kept_copies,
    matrix,
    number,
    per_element,
    positions,
    text,
)


def _cost_shape(settings: Settings, inputs: Inputs) -> Inputs:
    (found,) = inputs
    expect_float(settings, found)
    for key in ("vocab_size", "in_dim"):
        if settings[key] is not None:
            expect_last(settings, found, integer(settings, key), key)
    if settings["cost_function"] != "mse" and not found.shape:
        raise Mismatch(f"found input {found}, expected [.., classes]")
    return (TensorSpec(shape=(), dtype=found.dtype),)


def _cost_check(settings: Settings) -> tuple[str, ...]:
    function = settings["cost_function"]
    problems = []
    if number(settings, "label_smoothing") and function == "mse":
        problems.append("config key 'label_smoothing': found it with cost_function mse, expected ce or ce_logits")
    if number(settings, "z_loss") and function != "ce_logits":
        problems.append(f"config key 'z_loss': found it with cost_function {function}, expected ce_logits")
    return tuple(problems)


def _cost_target(settings: Settings, found: TensorSpec) -> TensorSpec:
    """Class indexes for cross entropy, the same tensor (as numpy can hold it) for mse."""
    if settings["cost_function"] == "mse":
        return TensorSpec(shape=found.shape, dtype=from_numpy(found.dtype))
    return _classes(settings, found)


def _classes(_: Settings, found: TensorSpec) -> TensorSpec:
    return TensorSpec(shape=found.shape[:-1], dtype="int64")


def _head_shape(settings: Settings, inputs: Inputs) -> Inputs:
    expect_last(settings, inputs[0], integer(settings, "in_dim"), "in_dim")
    return (TensorSpec(shape=(), dtype=inputs[0].dtype),)


def _head_infer(_config: Settings, inputs: Inputs, tied: tuple[int, ...] | None) -> Settings:
    known: dict[str, ConfigValue] = {"in_dim": inputs[0].shape[-1]} if inputs[0].shape else {}
    if tied is not None:
        known["out_dim"] = tied[0]
    return known


def _head_check(settings: Settings) -> tuple[str, ...]:
    if settings["tie_weight_alias"] is None:
        return ("config key 'tie_weight_alias': found nothing, expected the alias of the head's weight",)
    return ()


def _head_parameters(settings: Settings) -> tuple[ParameterSpec, ...]:
    return (matrix(settings, "weight", (integer(settings, "out_dim"), integer(settings, "in_dim"))),)


def _head_flops(settings: Settings, inputs: Inputs, _: Inputs) -> int:
    per_position = 2 * integer(settings, "in_dim") * integer(settings, "out_dim") + 8 * integer(settings, "out_dim")
    return positions(inputs) * per_position


def _head_working(settings: Settings, inputs: Inputs, rows: int) -> int:
    """A chunk of the logits, and what their log-sums are made from."""
    vocabulary = integer(settings, "out_dim")
    logits = min(rows * positions(inputs) * vocabulary, max(HEAD_CHUNK, vocabulary))
    return 2 * logits * DTYPE_BYTES[text(settings, "cost_precision")]


def _ignored(settings: Settings) -> int | None:
    return None if settings.get("cost_function") == "mse" else integer(settings, "ignore_index")


def _cost(lib: Library, inputs: Tensors, _: Weights, call: Call) -> Tensors:
    """Sum over this microbatch's valid targets / valid targets of the whole step, so that the split changes nothing."""
    settings, target, (x,) = call.settings, call.target, inputs
    if text(settings, "cost_function") == "mse":
        if target.shape != x.shape:
            raise ValueError(f"target of shape {list(target.shape)}, expected {list(x.shape)}")
        total = lib.functional.mse_loss(x, target.to(x.dtype), reduction="sum")
    else:
        total = _cross_entropy(lib, x.reshape(-1, x.shape[-1]), target.reshape(-1), settings)
    return (total / max(call.valid, 1),)


def _cross_entropy(lib: Library, x: Tensor, target: Tensor, settings: Settings) -> Tensor:
    """Summed over the valid ones of ``target`` [n]; ``x`` [n, classes]."""
    ignored, smoothing = integer(settings, "ignore_index"), number(settings, "label_smoothing")
    z = number(settings, "z_loss")
    if text(settings, "cost_function") == "ce_logits":
        total = lib.functional.cross_entropy(
            x, target, ignore_index=ignored, reduction="sum", label_smoothing=smoothing
        )
        if z:
            total = total + z * (lib.torch.logsumexp(x, dim=-1).square() * (target != ignored)).sum()
        return total
    # A probability of zero has no logarithm; the smallest number that is one costs enough.
    logs = x.clamp_min(lib.torch.finfo(x.dtype).tiny).log()
    total = lib.functional.nll_loss(logs, target, ignore_index=ignored, reduction="sum")
    if smoothing:
        spread = -(logs.mean(dim=-1) * (target != ignored)).sum()
        total = (1.0 - smoothing) * total + smoothing * spread
    return total


def _head(lib: Library, inputs: Tensors, weights: Weights, call: Call) -> Tensors:
    settings = call.settings
    total = lib.head_cross_entropy(
        inputs[0].reshape(-1, inputs[0].shape[-1]),
        weights["weight"],
        call.target.reshape(-1),
        ignored=integer(settings, "ignore_index"),
        smoothing=number(settings, "label_smoothing"),
        z=number(settings, "z_loss"),
    )
    return (total / max(call.valid, 1),)


_IGNORE_INDEX = Key(
    name="ignore_index",
    kind="int",
    default=-100,
    least=-(2**63),
    below=2**63,
    about="Targets of this value count nowhere (not with mse).",
)
_LABEL_SMOOTHING = Key(
    name="label_smoothing",
    kind="float",
    default=0.0,
    least=0.0,
    below=1.0,
    about="Share of the target that is spread over all classes (not with mse).",
)
_Z_LOSS = Key(
    name="z_loss",
    kind="float",
    default=0.0,
    least=0.0,
    about="Times the square of the log-sum of the exponentials is added at every valid target "
    "(Chowdhery et al., 2022; of logits only).",
)
_COST_PRECISION = Key(
    # Its sums have thousands of terms and its value is what people read: bf16 is no choice.
    name="cost_precision",
    kind="str",
    derive=lambda settings: from_numpy(DTYPE_OF[text(settings, "activation_precision")]),
    choices=("float32", "float64"),
    derived="that of the activations, float32 for bf16",
    about="What the cost is computed in, and what its value has.",
)

TYPES = (
    NodeType(
        name="cost",
        purpose="What training minimises: the mean over the valid targets of the whole step.",
        shapes="[.., classes] -> [] (ce, ce_logits; targets [..] int64), [..] -> [] (mse; targets [..])",
        keys=(
            Key(
                name="cost_function",
                kind="str",
                required=True,
                choices=("mse", "ce", "ce_logits"),
                about="Squared error; cross entropy of probabilities; cross entropy of logits.",
            ),
            dimension("vocab_size", "Checked against the input's last axis when given."),
            dimension("in_dim", "The same."),
            _IGNORE_INDEX,
            _COST_PRECISION,
            _LABEL_SMOOTHING,
            _Z_LOSS,
        ),
        shape=_cost_shape,
        kernel=_cost,
        examples=(
            Example(config={"cost_function": "mse"}),
            Example(config={"cost_function": "ce_logits"}),
            Example(config={"cost_function": "ce_logits", "label_smoothing": 0.1, "z_loss": 0.01, "ignore_index": 2}),
            Example(config={"cost_function": "ce"}, positive=True),
            Example(config={"cost_function": "ce", "label_smoothing": 0.2}, positive=True),
        ),
        check=_cost_check,
        target=_cost_target,
        ignored=_ignored,
        flops=per_element(8),
        kept=kept_copies(1),
        revision=2,
    ),
    NodeType(
        name="tied_lm_head_ce",
        purpose="A tied head and the cross entropy of its logits in one, which never holds all the logits; "
        "a rewrite makes it of `linear` and `cost`.",
        shapes="[.., in_dim] -> [] (targets [..] int64)",
        aliases=("fusedlmheadce",),
        keys=(
            dimension("in_dim", "Size of the input's last axis.", required=True),
            dimension("out_dim", "Number of classes.", required=True),
            _IGNORE_INDEX,
            _COST_PRECISION,
            _LABEL_SMOOTHING,
            _Z_LOSS,
        ),
        shape=_head_shape,
        kernel=_head,
        examples=(
            Example(config={"in_dim": 4, "out_dim": 7, "tie_weight_alias": "head"}),
            Example(
                config={
                    "in_dim": 4,
                    "out_dim": 7,
                    "tie_weight_alias": "head",
                    "label_smoothing": 0.1,
                    "z_loss": 0.01,
                },
            ),
        ),
        check=_head_check,
        parameters=_head_parameters,
        tensor="weight",
        infer=_head_infer,
        target=_classes,
        ignored=_ignored,
        flops=_head_flops,
        working=_head_working,
        # The log-sums of the exponentials, the classes, and which of them count.
        kept=lambda _settings, inputs, _outputs: (
            positions(inputs) * (DTYPE_BYTES[inputs[0].dtype] + DTYPE_BYTES["int64"] + 1)
        ),
        revision=2,
    ),
)
