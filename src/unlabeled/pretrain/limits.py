"""What the fields of a recipe may be, refused with one line that names the field, its value and its range."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from unlabeled.errors import UserError


class Limits:
    """Checks of one recipe.

    Args:
        recipe: dataclasses in a dataclass.
        where: what its values come from, for the error ("the command line", a file).
    """

    def __init__(self, recipe: Any, where: str) -> None:
        self.recipe, self.where = recipe, where

    def need(self, good: bool, name: str, text: str) -> None:
        """Raise UserError unless good; text says what the field may be, after "and"."""
        if not good:
            raise UserError(f"{self.where}: {name} is {self._value(name)}, and {text}")

    def at_least(self, least: float, *names: str) -> None:
        """Each is a number from `least` on."""
        for name in names:
            self.need(self._value(name) >= least, name, f"must be at least {least:g}")

    def above(self, least: float, *names: str) -> None:
        """Each is a number above `least`."""
        for name in names:
            self.need(self._value(name) > least, name, f"must be above {least:g}")

    def within(self, low: float, high: float, *names: str, kind: str = "") -> None:
        """Each is a number from low to high; kind: of what, as "a share"."""
        for name in names:
            what = f"is {kind}, in [{low:g}, {high:g}]" if kind else f"must lie in [{low:g}, {high:g}]"
            self.need(low <= self._value(name) <= high, name, what)

    def range_within(self, high: float, *names: str) -> None:
        """Each is a pair with 0 < low <= high; high: that its second may be at most."""
        for name in names:
            first, last = self._value(name)
            bound = f" <= {high:g}" if high < float("inf") else ""
            self.need(0 < first <= last <= high, name, f"needs 0 < low <= high{bound}")

    def _value(self, name: str) -> Any:
        return attrgetter(name)(self.recipe)
