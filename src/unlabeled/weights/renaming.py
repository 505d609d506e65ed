"""Keys of one weight format to those of another. It needs no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable


def renamer(pairs: Iterable[tuple[str, str]]) -> Callable[[str], str]:
    """Return a function that renames keys from the first column's form to the second's.

    "{i}" stands for a block's number; a key that continues after a listed name with .weight or .bias
    keeps that ending; a key that is not listed stays as it is.
    """
    rules = [
        (re.compile(re.escape(old).replace(r"\{i\}", r"(\d+)") + r"(|\.weight|\.bias)"), new)
        for old, new in pairs
    ]

    def rename(key: str) -> str:
        for pattern, new in rules:
            if match := pattern.fullmatch(key):
                return new.format(i=match[1]) + match[match.lastindex or 0]
        return key

    return rename
