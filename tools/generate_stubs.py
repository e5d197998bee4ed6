"""Generate the protobuf modules from ``proto/`` and commit the result.

Usage, in a virtual environment with ``grpcio-tools==1.76.0`` (its code is of the protobuf 6.31 line, which every
protobuf from 6.31.1 to 7 accepts; a newer generator would raise the lower bound)::

    python tools/generate_stubs.py [--baseline]

``--baseline`` also freezes what there is now: the test suite holds every later description against it.
Only messages and descriptors are generated: services are bound from the descriptors (``dcnr.adapters.grpc.server``).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "src/dcnr/adapters/grpc/generated"
BASELINE = ROOT / "proto/baseline.binpb"
INCLUDES = Path(protoc.__file__).parent / "_proto"


def main() -> int:
    """Write ``generated/*_pb2.py`` and ``*_pb2.pyi``; returns the exit code of protoc."""
    sources = sorted(str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto").rglob("*.proto"))
    TARGET.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        code = protoc.main(
            [
                "protoc",
                f"-I{ROOT / 'proto'}",
                f"-I{INCLUDES}",
                f"--python_out={folder}",
                f"--pyi_out={folder}",
                *sources,
            ]
        )
        if code != 0:
            return int(code)
        if "--baseline" in sys.argv[1:]:
            protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"--descriptor_set_out={BASELINE}", *sources])
        for path in sorted((Path(folder) / "dcnr/v1").iterdir()):
            text = path.read_text(encoding="utf-8").replace("from dcnr.v1 import", f"from {_package()} import")
            (TARGET / path.name).write_text(text, encoding="utf-8")
    return 0


def _package() -> str:
    return ".".join(TARGET.relative_to(ROOT / "src").parts)


if __name__ == "__main__":
    sys.exit(main())
