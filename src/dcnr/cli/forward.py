"""``dcnr forward``: one forward pass, arrays in a file in, arrays in a file out."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcnr.cli.output import JsonOption, NetworkOption, command, print_json, say
from dcnr.cli.place import open_client
from dcnr.errors import InvalidData, UsageError

if TYPE_CHECKING:
    from dcnr.client.forward import Array


@command
def forward(
    target: Annotated[
        str, typer.Argument(metavar="NETWORK", help="A network (file, name, id or its beginning) or a session.")
    ],
    input: Annotated[Path, typer.Option(metavar="FILE.npz", help="An array [rows, ...] for every input, by its name.")],
    output: Annotated[Path, typer.Option(metavar="FILE.npz", help="Where the declared outputs go, by their names.")],
    network: NetworkOption = None,
    json: JsonOption = False,
) -> None:
    """One forward pass through the newest commit, through the initial weights where there is none."""
    if output.suffix != ".npz":
        raise UsageError(f"--output takes a file named .npz, found {output}")
    if not output.parent.is_dir():
        raise UsageError(f"--output: no folder {output.parent}")
    arrays = read_npz(input)
    with open_client(network) as net:
        outputs = net.forward(Path(target) if Path(target).is_file() else target, arrays)
    write_npz(output, outputs)
    shapes = {name: list(array.shape) for name, array in outputs.items()}
    if json:
        print_json({"session": outputs.session, "step": outputs.step, "output": str(output), "shapes": shapes})
        return
    used = f"session {outputs.session[:8]}, step {outputs.step}" if outputs.step else "the initial weights"
    say(f"{', '.join(f'{name} {shape}' for name, shape in shapes.items())} from {used}, written to {output}")


def read_npz(path: Path) -> dict[str, Array]:
    """Raises :class:`UsageError` where there is no such file, :class:`InvalidData` where it holds no plain arrays."""
    from dcnr.adapters.columns import read_arrays

    if not path.is_file():
        raise UsageError(f"no input file {path}")
    if path.suffix != ".npz":
        raise InvalidData(f"{path}: expected a file named .npz with an array for every input")
    return read_arrays(path)


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Whole or not at all. ``numpy.savez`` is not used, for it takes names that outputs may have for its own options."""
    import numpy as np

    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(fresh, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
