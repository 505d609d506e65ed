"""Which learning rate and weight decay each parameter of a backbone gets."""

from __future__ import annotations

import re

from torch import nn

_BLOCK = re.compile(r"blocks\.(\d+)\.")


def layer_of(name: str, depth: int) -> int:
    """The layer of a backbone's parameter: embeddings are 0, block i is i + 1, the last norm depth + 1."""
    if block := _BLOCK.match(name):
        return int(block[1]) + 1
    return depth + 1 if name.startswith("norm.") else 0


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is for a parameter: not for biases, norms, LayerScale and what else has one dimension."""
    return parameter.ndim > 1 and not name.endswith((".bias", ".gamma"))
