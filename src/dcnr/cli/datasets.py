"""``dcnr data``: datasets."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dcnr.cli.output import JsonOption, NetworkOption, command, print_fields, print_json, print_table, say
from dcnr.cli.place import open_client
from dcnr.errors import UsageError

app = typer.Typer(help="Datasets: text is tokenized here and uploaded as shards.", no_args_is_help=True)


@app.command("add")
@command
def add(
    path: Annotated[str, typer.Argument(help="A file, a folder or a glob; quote a glob.")],
    name: Annotated[str, typer.Option(help="A name to find it by. Default: the path's own.")] = "",
    tokenizer: Annotated[
        str, typer.Option(help="bpe:N (trained on the text), bytes, or a tokenizer file.")
    ] = "bpe:4096",
    split: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of the text kept for validation.")] = 0.05,
    network: NetworkOption = None,
    json: JsonOption = False,
) -> None:
    """Register a dataset; prints its handle."""
    from dcnr.client.connect import is_files

    if not is_files(path):
        raise UsageError(f"no file or folder {path}")
    with open_client(network) as net:
        dataset = net.add_data(path, name=name, tokenizer=tokenizer, split=split)
    if json:
        print_json({"dataset": dataset})
    else:
        say(dataset)


def _facts(dataset: str, data: bytes) -> dict[str, Any]:
    from dcnr.session.dataset import Manifest

    manifest = Manifest.from_bytes(data)
    facts: dict[str, Any] = {
        "dataset": dataset,
        "name": manifest.name,
        "kind": manifest.kind,
        "train": manifest.train.count,
        "validation": manifest.validation.count,
    }
    if manifest.tokenizer is not None:
        facts |= {
            "tokenizer": manifest.tokenizer.kind,
            "vocab": manifest.tokenizer.vocab,
            "source_bytes": manifest.source_bytes,
            "text_sha256": manifest.text_sha256,
        }
    return facts


@app.command("list")
@command
def list_datasets(network: NetworkOption = None, json: JsonOption = False) -> None:
    """The datasets that exist. Sizes are tokens (text) or rows (columns)."""
    with open_client(network) as net:
        facts = [_facts(dataset, manifest) for dataset, manifest in net.datasets()]
    if json:
        for fact in facts:
            print_json(fact)
        return
    print_table(
        ("dataset", "name", "kind", "train", "validation"),
        ((f["dataset"][:12], f["name"], f["kind"], f"{f['train']:,}", f"{f['validation']:,}") for f in facts),
    )


@app.command("show")
@command
def show(
    name: Annotated[str, typer.Argument(help="Handle, the beginning of one, or a name.")],
    network: NetworkOption = None,
    json: JsonOption = False,
) -> None:
    """One dataset: what it holds, and its tokenizer."""
    from dcnr.session.dataset import Manifest

    with open_client(network) as net:
        dataset, data = net.dataset(name)
    facts = _facts(dataset, data)
    if json:
        print_json(facts)
        return
    print_fields(facts)
    print_table(
        ("column", "dtype", "shape"), ((c.name, c.dtype, list(c.shape)) for c in Manifest.from_bytes(data).stored)
    )
