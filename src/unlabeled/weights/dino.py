"""The original DINO (arXiv 2104.14294): a backbone without LayerScale and without a mask token.

Read as a backbone whose LayerScale is ones, which is exact (x * 1 is x), and whose mask token is zeros.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from unlabeled.weights.files import State

MASK_NOTE = "the file has no mask token: it is zeros"


def lacks_layer_scale(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict (our keys) has no LayerScale in any block; in some only is a fault of the file."""
    return not any(".ls1." in key or ".ls2." in key for key in state)


def with_layer_scale(state: Mapping[str, Tensor], width: int) -> State:
    """Return the state dict with a LayerScale of ones, (D,), on every residual branch."""
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    names = [f"blocks.{block}.ls{branch}.gamma" for block in blocks for branch in (1, 2)]
    return {**state, **{name: torch.ones(width) for name in names}}


def without_ones(state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    """Return the state dict without its LayerScale if that is all ones, and a note that says so."""
    scales = [key for key in state if key.endswith((".ls1.gamma", ".ls2.gamma"))]
    if any((state[key] != 1).any() for key in scales):
        return dict(state), []
    kept = {key: value for key, value in state.items() if key not in set(scales)}
    return kept, ["LayerScale is all ones: it was left out, as the original DINO has none."]
