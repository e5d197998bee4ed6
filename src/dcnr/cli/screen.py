"""The demo's live display: a bar, a coloured row per PNode, and event lines above; plain lines without a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcnr.cli.display import Meter
from dcnr.cli.output import out, say, size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

COLOURS = {"green": "green", "yellow": "yellow", "red": "red", "dead": "bright_black", "gone": "bright_black"}


@dataclass(slots=True, kw_only=True)
class PNodeRow:
    """One PNode as the display shows it. ``state`` is green, yellow, red, gone or dead."""

    number: int
    peer: str
    pid: int
    state: str = "green"
    memory_bytes: int = 0
    vnodes: Sequence[str] = ()
    segments: int = 0

    def cells(self) -> tuple[str, ...]:
        if self.state == "dead":
            return (f"PNode {self.number}", "dead", str(self.pid), "", "", "killed with SIGKILL")
        hosted = f"{len(self.vnodes)} VNodes: {summarise(self.vnodes)}" if self.vnodes else "no VNodes"
        return (
            f"PNode {self.number}",
            self.state,
            str(self.pid),
            size(self.memory_bytes),
            f"{self.segments} segment{'s' * (self.segments != 1)}",
            hosted,
        )


def summarise(vnodes: Iterable[str]) -> str:
    """``embedder block_0 (9) head``: VNodes of one block become one word, in the order of their first."""
    counts: dict[str, int] = {}
    for vnode in vnodes:
        numbered = re.match(r"(.*?\d+)[_./-]", vnode)
        word = numbered[1] if numbered else vnode
        counts[word] = counts.get(word, 0) + 1
    return " ".join(word if count == 1 else f"{word} ({count})" for word, count in counts.items())


class Screen:
    """Shows a :class:`Meter` and PNode rows; :meth:`line` adds a line of history. ``hint`` is the bottom line."""

    def __init__(self, meter: Meter, rows: Sequence[PNodeRow]) -> None:
        self._meter = meter
        self._rows = rows
        self._live: Live | None = None
        self._every = max(1, meter.steps // 20)
        self.hint = ""

    def __enter__(self) -> Screen:
        if out().is_terminal:
            from rich.live import Live

            self._live = Live(console=out(), get_renderable=self._render, refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self.hint = ""
            self._live.stop()
            self._live = None

    def line(self, text: str, style: str = "") -> None:
        """A line that stays."""
        if self._live is None:
            say(text)
        else:
            self._live.console.print(text, style=style, markup=False, highlight=False)

    def stepped(self) -> None:
        """A step is done. The live display shows it by itself; plain output gets about twenty lines in all."""
        meter = self._meter
        if self._live is None and (meter.step % self._every == 0 or meter.step in (1, meter.steps)):
            say(f"step {meter.step}/{meter.steps}  {meter.figures()}")

    def moved(self) -> None:
        """The placement has changed: plain output gets the rows once."""
        if self._live is None:
            for row in self._rows:
                say("  " + "  ".join(cell for cell in row.cells() if cell))

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        meter = self._meter
        top = Table.grid(padding=(0, 1), expand=True)
        top.add_column(ratio=1)
        top.add_column(no_wrap=True)
        top.add_row(
            ProgressBar(total=meter.steps, completed=meter.step), f"step {meter.step}/{meter.steps}  {meter.figures()}"
        )
        table = Table.grid(padding=(0, 2), expand=True)
        for _ in range(5):
            table.add_column(no_wrap=True)
        table.add_column(ratio=1, overflow="ellipsis", no_wrap=True)
        for row in self._rows:
            name, state, *others = row.cells()
            style = COLOURS.get(row.state, "")
            cells: list[Any] = [Text(name, style), Text(f"● {state}", style), *(Text(o, style) for o in others)]
            table.add_row(*cells)
        return Group(top, table, Text(self.hint, "dim"))
