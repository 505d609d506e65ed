"""Which field a user means by a name that no recipe has."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What other projects call them: the last part of the name, and ours.
OTHER_NAMES = {
    "amp": "precision",
    "batch": "batch_size",
    "color_jitter": "jitter",
    "dim": "width",
    "ema": "momentum",
    "embed_dim": "width",
    "epochs": "steps",
    "eval": "evaluation",
    "grad_clip": "clip",
    "gradient_accumulation": "accumulation",
    "grayscale": "grey",
    "layers": "depth",
    "learning_rate": "lr",
    "max_steps": "steps",
    "min_lr": "final_lr",
    "momentum_teacher": "momentum",
    "n_prototypes": "num_prototypes",
    "out_dim": "num_prototypes",
    "solarize": "solarise",
    "solarization": "solarise",
    "wd": "weight_decay",
}
_LETTERS = 3  # of a name that is looked for inside others


def nearest_field(name: str, fields: Iterable[str]) -> str | None:
    """The dotted field that a wrong name most likely means, or None.

    A field that has the same last part in another section, or is called so elsewhere, is meant before one whose
    letters are merely alike.

    Args:
        name: what the user wrote, dotted or not.
        fields: dotted names that there are.
    """
    known = list(fields)
    section, _, last = name.replace("-", "_").rpartition(".")
    last = next((ours for field in known if _last(field) == (ours := OTHER_NAMES.get(last, last))), last)
    own = [field for field in known if section and field.startswith(f"{section}.")]
    same = [field for field in own or known if _last(field) == last]
    if found := same or _holding(own, last) or [field for field in known if _last(field) == last]:
        return found[0]
    if near := difflib.get_close_matches(last, map(_last, own), 1):
        return f"{section}.{near[0]}"
    if found := _holding(known, last):
        return found[0]
    return next(iter([] if own else difflib.get_close_matches(name, known, 1)), None)


def _holding(fields: list[str], last: str) -> list[str]:
    """Those whose last part lies in the name or holds it, as `batch_size` holds `batch`, the most alike first."""
    holding = [
        field
        for field in fields
        if min(len(last), len(_last(field))) >= _LETTERS and (last in _last(field) or _last(field) in last)
    ]
    return sorted(holding, key=lambda field: -difflib.SequenceMatcher(None, _last(field), last).ratio())


def _last(field: str) -> str:
    return field.rpartition(".")[2]
