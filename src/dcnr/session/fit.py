"""Does a dataset fit a network and a recipe? Asked by a client before it uploads, and by the owner before it records."""

from __future__ import annotations

from dcnr.errors import InvalidData
from dcnr.network.analysis import Network
from dcnr.session.dataset import Manifest
from dcnr.session.recipe import Recipe


def context_of(network: Network, manifest: Manifest, recipe: Recipe) -> int:
    """Length of a row of text as ``network`` takes it, 0 for columns.

    Raises :class:`InvalidData` where a column is absent or has another dtype or shape, where the tokenizer makes tokens
    that the network does not know, and where there are fewer rows than a batch.
    """
    definition = network.definition
    context = definition.inputs[0].shape[0] if manifest.kind == "text" and definition.inputs[0].shape else 0
    columns = {c.name: c for c in manifest.columns_for(context)}
    wanted = [(f"input {i.name!r}", i.column, i.dtype, i.shape) for i in definition.inputs]
    wanted += [
        (f"cost {c.name!r}", c.target, t.dtype, t.shape)
        for c, t in zip(definition.costs, network.cost_targets(), strict=True)
    ]
    for what, name, dtype, shape in wanted:
        column = columns.get(name)
        if column is None:
            raise InvalidData(f"{what} takes column {name!r}; the dataset has {', '.join(sorted(columns))}")
        if (column.dtype, column.shape) != (dtype, shape):
            raise InvalidData(
                f"{what} takes {dtype} {list(shape)} from column {name!r}; the dataset has "
                f"{column.dtype} {list(column.shape)}"
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
        raise InvalidData(f"the dataset has {rows} rows{of}, fewer than a batch of {recipe.batch_size}")
    return context
