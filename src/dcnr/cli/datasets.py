"""``dcnr data``: datasets."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dcnr.cli.output import (
    JsonOption,
    NetworkOption,
    command,
    number,
    print_fields,
    print_json,
    print_table,
    say,
    size,
    warn,
)
from dcnr.cli.place import open_client
from dcnr.errors import UsageError

app = typer.Typer(help="Datasets: read here, text tokenized, and uploaded as shards.", no_args_is_help=True)


@app.command("add")
@command
def add(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH...", help="Files, folders or globs (quote a glob): text, npz, npy, csv, parquet."),
    ],
    name: Annotated[str, typer.Option(help="A name to find it by. Default: the path's own.")] = "",
    tokenizer: Annotated[
        str, typer.Option(help="Of text: bpe:N (trained on it), bytes, or a tokenizer file.")
    ] = "bpe:4096",
    split: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share kept for validation.")] = 0.05,
    invalid_utf8: Annotated[
        str, typer.Option("--invalid-utf8", help="Bytes of text that are no UTF-8: refuse, or replace (by U+FFFD).")
    ] = "refuse",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="COLUMN=DTYPE,...",
            help="Columns of files in float32, float64 or int64, as in x=float32: whole numbers of a csv are int64 else.",
        ),
    ] = "",
    network: NetworkOption = None,
    json: JsonOption = False,
) -> None:
    """Register a dataset; prints its handle."""
    from dcnr.client.connect import is_files
    from dcnr.session.dataset import Manifest

    for path in paths:
        if not is_files(path) and "://" not in path:
            raise UsageError(f"no file or folder {path}")
    dtypes = _dtypes(dtype)
    with open_client(network) as net:
        dataset = net.add_data(
            paths, name=name, tokenizer=tokenizer, split=split, invalid_utf8=invalid_utf8, dtypes=dtypes
        )
        replaced = Manifest.from_bytes(net.dataset(dataset)[1]).replaced
    if replaced:
        warn(f"{replaced} byte sequences that are no UTF-8 became U+FFFD")
    if json:
        print_json({"dataset": dataset, "replaced": replaced})
    else:
        say(dataset)


def _dtypes(text: str) -> dict[str, str]:
    """Raises :class:`UsageError`."""
    found: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        # A column may be named with a sign of equality, a dtype is not.
        column, _, dtype = part.strip().rpartition("=")
        if not column:
            raise UsageError(f"--dtype {text}: found {part!r}, expected COLUMN=DTYPE, as in x=float32")
        found[column] = dtype
    return found


def _facts(dataset: str, data: bytes) -> dict[str, Any]:
    """Counts are tokens (text) or rows (columns); columns are those that a network sees."""
    from dcnr.session.dataset import Manifest

    manifest = Manifest.from_bytes(data)
    columns: list[dict[str, Any]]
    if manifest.kind == "text":
        columns = [{"name": name, "dtype": "int64", "shape": ["context"]} for name in ("tokens", "targets")]
    else:
        columns = [{"name": c.name, "dtype": c.dtype, "shape": list(c.shape)} for c in manifest.stored]
    facts: dict[str, Any] = {
        "dataset": dataset,
        "name": manifest.name,
        "kind": manifest.kind,
        "train": manifest.train.count,
        "validation": manifest.validation.count,
        "columns": columns,
        "stored_bytes": sum(manifest.shard_sizes().values()),
        "shards": len(manifest.shard_sizes()),
    }
    if manifest.tokenizer is not None:
        facts |= {
            "tokenizer": manifest.tokenizer.kind,
            "vocab": manifest.tokenizer.vocab,
            "tokenizer_sha256": manifest.tokenizer.sha256,
            "source_bytes": manifest.source_bytes,
            "replaced": manifest.replaced,
            "text_sha256": manifest.text_sha256,
        }
    return facts


def _amount(facts: dict[str, Any], split: str) -> str:
    return f"{number(facts[split])} {'tokens' if facts['kind'] == 'text' else 'rows'}"


@app.command("list")
@command
def list_datasets(network: NetworkOption = None, json: JsonOption = False) -> None:
    """The datasets that exist, the newest last."""
    with open_client(network) as net:
        facts = [_facts(dataset, manifest) for dataset, manifest in net.datasets()]
    if json:
        for fact in facts:
            print_json(fact)
        return
    print_table(
        ("dataset", "name", "kind", "train", "validation", "size"),
        (
            (
                f["dataset"][:12],
                f["name"],
                f["kind"],
                _amount(f, "train"),
                _amount(f, "validation"),
                size(f["stored_bytes"]),
            )
            for f in facts
        ),
    )


@app.command("show")
@command
def show(
    name: Annotated[str, typer.Argument(help="Handle, the beginning of one, or a name.")],
    network: NetworkOption = None,
    json: JsonOption = False,
) -> None:
    """One dataset: its columns, its splits, and the tokenizer of text."""
    with open_client(network) as net:
        facts = _facts(*net.dataset(name))
    if json:
        print_json(facts)
        return
    fields = {
        "dataset": facts["dataset"],
        "name": facts["name"],
        "kind": facts["kind"],
        "train": _amount(facts, "train"),
        "validation": _amount(facts, "validation"),
        "stored": f"{size(facts['stored_bytes'])} in {facts['shards']:,} shards",
    }
    if "tokenizer" in facts:
        replaced = f", {facts['replaced']:,} invalid sequences replaced" if facts["replaced"] else ""
        fields |= {
            "tokenizer": f"{facts['tokenizer']}, {facts['vocab']:,} tokens, sha256 {facts['tokenizer_sha256']}",
            "text": f"{size(facts['source_bytes'])}{replaced}, sha256 {facts['text_sha256']}",
        }
    print_fields(fields)
    rows = ((c["name"], c["dtype"], ", ".join(map(str, c["shape"])) or "one number") for c in facts["columns"])
    print_table(("column", "dtype", "shape of a row"), rows)


@app.command("delete")
@command
def delete(
    name: Annotated[str, typer.Argument(help="Handle, the beginning of one, or a name (the newest of that name).")],
    network: NetworkOption = None,
    json: JsonOption = False,
) -> None:
    """Delete a dataset and what only it stores. Refused while an unfinished session uses it."""
    with open_client(network) as net:
        dataset = net.delete_data(name)
    if json:
        print_json({"deleted": dataset})
    else:
        say(f"deleted {dataset}")
