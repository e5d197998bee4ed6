"""``dcnr network``: network files and the networks that exist."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dcnr.cli.analysing import analyze
from dcnr.cli.node_types import types
from dcnr.cli.output import JsonOption, NetworkOption, command, print_fields, print_json, print_table, say
from dcnr.cli.place import open_client
from dcnr.errors import UsageError

app = typer.Typer(help="Network files, and the networks that exist.", no_args_is_help=True)
app.command("analyze")(analyze)
app.command("types")(types)


@app.command("template")
@command
def template(
    kind: Annotated[str, typer.Argument(help="gpt, llama or mlp.")],
    preset: Annotated[
        str | None, typer.Option(help="Sizes by name: demo, published-small, published-large (gpt).")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Blocks, or hidden layers (mlp).")] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Width.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads (gpt, llama).")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Heads of keys and values (llama).")] = None,
    vocab: Annotated[int | None, typer.Option(min=2, help="Size of the vocabulary (gpt, llama).")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a row (gpt, llama).")] = None,
    inputs: Annotated[int, typer.Option(min=1, help="Width of the input (mlp).")] = 16,
    outputs: Annotated[int, typer.Option(min=1, help="Width of the output, classes of ce_logits (mlp).")] = 1,
    cost: Annotated[str, typer.Option(help="mse, ce_logits (mlp).")] = "mse",
) -> None:
    """Print a network file."""
    from dcnr.adapters.yaml_network import dump_network
    from dcnr.network import templates

    if preset is not None and templates.PRESETS.get(preset, ("",))[0] != kind:
        known = ", ".join(name for name, (of, *_) in templates.PRESETS.items() if of == kind) or "none"
        raise UsageError(f"unknown preset {preset!r} of {kind!r}: expected {known}")
    given = {"layers": layers, "dim": dim, "heads": heads, "vocab": vocab, "context": context}
    if kind == "llama":
        given["kv_heads"] = kv_heads
    sizes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    match kind:
        case "gpt":
            graph = templates.gpt(**sizes) if preset is None else templates.preset(preset, **sizes)
        case "llama":
            graph = templates.llama(**sizes)
        case "mlp":
            graph = templates.mlp(inputs, (dim or 64,) * (layers or 2), outputs, cost)
        case other:
            raise UsageError(f"unknown template {other!r}: gpt, llama or mlp")
    say(dump_network(graph.definition()).rstrip("\n"))


@app.command("create")
@command
def create(
    file: Annotated[Path, typer.Argument(help="A network file (YAML).")],
    network: NetworkOption = None,
    json: JsonOption = False,
) -> None:
    """Register a network; prints its id."""
    if not file.is_file():
        raise UsageError(f"no network file {file}")
    with open_client(network) as net:
        created = net.create_network(file)
    if json:
        print_json({"network": created})
    else:
        say(created)


@app.command("list")
@command
def list_networks(network: NetworkOption = None, json: JsonOption = False) -> None:
    """The networks that exist."""
    with open_client(network) as net:
        infos = net.networks()
    if json:
        for info in infos:
            print_json(
                {"network": info.network, "name": info.name, "parameters": info.parameters, "vnodes": info.vnodes}
            )
        return
    print_table(
        ("network", "name", "parameters", "vnodes"),
        ((info.network[:12], info.name, f"{info.parameters:,}", info.vnodes) for info in infos),
    )


@app.command("show")
@command
def show(
    name: Annotated[str, typer.Argument(help="Id, the beginning of one, or a name.")],
    network: NetworkOption = None,
    json: JsonOption = False,
) -> None:
    """One network: its nodes, types and sizes."""
    from dcnr.network.analysis import analyse
    from dcnr.network.graph import canonical_json

    with open_client(network) as net:
        found, definition = net.network(name)
    if json:
        say(canonical_json(definition).decode())
        return
    analysed = analyse(definition)
    parameters = sum(info.parameter_bytes for info in analysed.vnodes.values())
    print_fields(
        {
            "network": found,
            "name": definition.name,
            "vnodes": len(definition.nodes),
            "kernel groups": len(analysed.groups),
            "parameter bytes": f"{parameters:,}",
        }
    )
    print_table(
        ("vnode", "type", "group", "outputs", "parameters"),
        (
            (
                node.id,
                node.type,
                analysed.vnodes[node.id].group,
                " ".join(str(list(spec.shape)) for spec in analysed.vnodes[node.id].outputs),
                " ".join(f"{p.name}{list(p.shape)}" for p in analysed.vnodes[node.id].parameters),
            )
            for node in definition.nodes
        ),
    )
