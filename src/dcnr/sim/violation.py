"""A broken invariant."""

from __future__ import annotations


class Violation(Exception):
    """Raised where an invariant of the design's section 9 is seen broken; the world adds time and process."""

    def __init__(self, invariant: str, text: str) -> None:
        super().__init__(f"{invariant}: {text}")
        self.invariant = invariant
        self.text = text
