"""Does a dataset fit a network and a recipe? Asked by a client before it uploads, and by the owner before it records."""

from __future__ import annotations

from dcnr.errors import InvalidData, InvalidNetwork
from dcnr.network.analysis import Network
from dcnr.session.dataset import Column, Manifest, input_column
from dcnr.session.recipe import Recipe


def context_of(network: Network, manifest: Manifest, recipe: Recipe) -> int:
    """Length of a row of text as ``network`` takes it, 0 for columns.

    Raises :class:`InvalidData` where a column is absent or has another dtype or shape, where the tokenizer makes tokens
    that the network does not know, and where there are fewer rows than a batch.
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
                f"{list(shape)}; {offered}"
            )
    if manifest.tokenizer is not None:
        for entry in definition.inputs:
            node, settings = network.vnodes[entry.node_id].node, network.vnodes[entry.node_id].settings
            vocabulary = settings.get("vocab_size")
            if isinstance(vocabulary, int) and vocabulary < manifest.tokenizer.vocab:
                raise InvalidData(
                    f"node {node.id!r} knows {vocabulary} tokens, the dataset's tokenizer makes "
                    f"{manifest.tokenizer.vocab}"
                )
    rows = manifest.rows("train", context)
    if rows < recipe.batch_size:
        of = f" of {context} tokens" if context else ""
        raise InvalidData(
            f"dataset {manifest.name!r} has {rows} rows{of} for training, fewer than a batch of {recipe.batch_size}"
        )
    return context


def same_weights(network: Network, source: Network) -> None:
    """Raises :class:`InvalidNetwork` naming every difference unless both have the same VNodes with parameters, of the same
    names, shapes and dtypes: then the states of one are weights for the other."""
    mine, theirs = _weights(network), _weights(source)
    problems = []
    for name in dict.fromkeys((*mine, *theirs)):
        here, there = mine.get(name), theirs.get(name)
        if here is None:
            problems.append(f"{name}: the session has {there}, the network has no such parameter")
        elif there is None:
            problems.append(f"{name}: the network has {here}, the session has no such parameter")
        elif here != there:
            problems.append(f"{name}: the network has {here}, the session {there}")
    if problems:
        raise InvalidNetwork(problems)


def _weights(network: Network) -> dict[str, str]:
    return {
        f"{vnode}.{spec.name}": f"{spec.dtype} {list(spec.shape)}"
        for vnode, info in network.vnodes.items()
        for spec in info.parameters
    }
