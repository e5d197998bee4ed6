"""Does a dataset fit a network and a recipe? Asked by a client before it uploads, and by the owner before it records."""

from __future__ import annotations

from dcnr.errors import InvalidData, InvalidNetwork, UsageError
from dcnr.ids import VNodeId
from dcnr.network.analysis import Network
from dcnr.network.rewrite import as_written
from dcnr.session.dataset import Column, Manifest, input_column
from dcnr.session.recipe import Recipe


def context_of(network: Network, manifest: Manifest, recipe: Recipe) -> int:
    """Length of a row of text as ``network`` takes it, 0 for columns.

    Raises :class:`InvalidData` where a column is absent or has another dtype or shape, where the tokenizer makes tokens
    that the network does not know, and where there are fewer rows than a batch. Raises :class:`UsageError` where evaluations
    are asked for and there is nothing to evaluate on.
    """
    definition = network.definition
    context = definition.inputs[0].shape[0] if manifest.kind == "text" and definition.inputs[0].shape else 0
    columns = manifest.columns_for(context)
    named = {c.name: c for c in columns}
    wanted: list[tuple[str, str, Column | None, str, tuple[int, ...]]] = []
    for entry in definition.inputs:
        # An input that names no column has its own name as its column, and takes the first where there is none.
        found = input_column(columns, entry.column) if entry.column == entry.name else named.get(entry.column)
        wanted.append((f"input {entry.name!r}", entry.column, found, entry.dtype, entry.shape))
    for cost, target in zip(definition.costs, network.cost_targets(), strict=True):
        wanted.append((f"cost {cost.name!r}", cost.target, named.get(cost.target), target.dtype, target.shape))
    offered = f"dataset {manifest.name!r} has {', '.join(f'{c.name} {c.dtype} {list(c.shape)}' for c in columns)}"
    for what, name, column, dtype, shape in wanted:
        if column is None:
            raise InvalidData(f"{what}: found no column {name!r}, expected one of {dtype} {list(shape)}; {offered}")
        if (column.dtype, column.shape) != (dtype, shape):
            raise InvalidData(
                f"{what}: found column {column.name!r} of {column.dtype} {list(column.shape)}, expected {dtype} "
                f"{list(shape)}; {offered}{_conversion(column, dtype, shape)}"
            )
    if manifest.tokenizer is not None:
        _check_vocabulary(network, manifest.tokenizer.vocab)
    rows = manifest.rows("train", context)
    if rows < recipe.batch_size:
        of = f" of {context} tokens" if context else ""
        raise InvalidData(
            f"dataset {manifest.name!r} has {rows} rows{of} for training, fewer than a batch of {recipe.batch_size}"
        )
    held = manifest.rows("validation", context)
    if recipe.eval_every and held < recipe.rows:
        raise UsageError(
            f"eval every {recipe.eval_every}: dataset {manifest.name!r} holds {held} rows out for validation, expected "
            f"at least a microbatch of {recipe.rows}: add the data with a larger split, or do not evaluate"
        )
    return context


def _conversion(column: Column, dtype: str, shape: tuple[int, ...]) -> str:
    """What to do where only the dtype is another: whole numbers of a csv are int64."""
    return f"; add it with --dtype {column.name}={dtype}" if column.shape == shape else ""


def _check_vocabulary(network: Network, tokens: int) -> None:
    """Every integer of text is one of ``tokens``: each embedder must know them all, each cost of classes have as many."""
    for info in network.vnodes.values():
        # Through views or not: what arrives as integers came from the text.
        known = info.settings.get("vocab_size")
        if isinstance(known, int) and known < tokens and any(spec.dtype == "int64" for spec in info.inputs):
            raise InvalidData(f"node {info.node.id!r} knows {known} tokens, the dataset's tokenizer makes {tokens}")
    for cost, target in zip(network.definition.costs, network.cost_targets(), strict=True):
        info = network.vnodes[cost.node_id]
        # A head with its cost has the logits inside.
        classes = info.settings.get("out_dim", info.inputs[0].shape[-1] if info.inputs[0].shape else 0)
        if target.dtype == "int64" and isinstance(classes, int) and classes < tokens:
            raise InvalidData(
                f"cost {cost.name!r} has {classes} classes, the dataset's tokenizer makes {tokens} tokens"
            )


def same_weights(network: Network, source: Network) -> None:
    """Raises :class:`InvalidNetwork` naming every difference unless both have the same VNodes with parameters, of the same
    names, shapes and dtypes: then the states of one are weights for the other.

    Both are compared as files write them, since users know no other form, and must be computed in the same form, since
    states are of that one.
    """
    mine, theirs = _weights(network), _weights(source)
    problems = []
    for name in dict.fromkeys((*mine, *theirs)):
        here, there = mine.get(name), theirs.get(name)
        if here is None:
            problems.append(f"{name}: the session has {_shown(there)}, the network has no such parameter")
        elif there is None:
            problems.append(f"{name}: the network has {_shown(here)}, the session has no such parameter")
        elif here != there:
            problems.append(f"{name}: the network has {_shown(here)}, the session {_shown(there)}")
    if not problems:
        stacks = dict.fromkeys((*network.heads, *source.heads))
        problems = [
            f"node {stack!r}: the network computes {_computed(network, stack)}, the session {_computed(source, stack)}; "
            "expected both alike: a metric or an output that names a head, for one, keeps heads apart"
            for stack in stacks
            if network.heads.get(stack) != source.heads.get(stack)
        ]
    if problems:
        raise InvalidNetwork(problems)


_Parameter = tuple[str, tuple[int, ...]]
"""dtype and shape"""


def _weights(network: Network) -> dict[str, _Parameter]:
    run = {
        f"{vnode}.{spec.name}": (spec.dtype, spec.shape)
        for vnode, info in network.vnodes.items()
        for spec in info.parameters
    }
    return as_written(network, run, lambda whole, first, last: (whole[0], (last - first, *whole[1][1:])))


def _shown(parameter: _Parameter | None) -> str:
    return "nothing" if parameter is None else f"{parameter[0]} {list(parameter[1])}"


def _computed(network: Network, stack: VNodeId) -> str:
    heads = network.heads.get(stack)
    return f"heads {', '.join(map(repr, heads))} as one" if heads else "each head by itself"
