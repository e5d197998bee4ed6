"""When the loss of a commit on the rows that are held out is computed: one at a time, at commits alone."""

from __future__ import annotations

from collections.abc import Callable

from dcnr.session.log import Base
from dcnr.session.recipe import Recipe

Answer = Callable[[float, int, str], None]
"""(loss, rows, a reason where there are none)."""


class Evaluations:
    """``compute`` gets a commit, how many rows at most, and what to call; ``told`` gets loss and rows, ``over`` follows."""

    def __init__(
        self,
        *,
        recipe: Recipe,
        compute: Callable[[Base, int, Answer], None],
        told: Callable[[Base, float, int], None],
        over: Callable[[], None],
    ) -> None:
        self.busy = False
        self._recipe = recipe
        self._compute = compute
        self._told = told
        self._over = over
        self._next = recipe.eval_every

    def go_on_from(self, step: int) -> None:
        """An earlier owner has seen to everything up to the commit of ``step``."""
        every = self._recipe.eval_every
        if every:
            self._next = (step // every + 1) * every

    def look(self, base: Base) -> None:
        """A commit is there: is one due?"""
        recipe = self._recipe
        due = recipe.eval_every > 0 and (base.step >= self._next or base.step == recipe.steps)
        if not due or self.busy:
            return
        self.go_on_from(base.step)
        self.busy = True

        def evaluated(loss: float, rows: int, reason: str) -> None:
            self.busy = False
            if rows:
                self._told(base, loss, rows)
            self._over()

        self._compute(base, recipe.eval_batches * recipe.batch_size, evaluated)
