"""Every released size, with all its width, against transformers: hidden states, attentions, pooled output.

The smaller configurations of test_huggingface.py take every block and every combination; here each size has
some. UNLABELED_PARITY=all runs them all (about ten minutes of one core).
"""

import os
from pathlib import Path

import pytest
import torch

from tests.weights.test_huggingface import assert_same_hidden_states
from unlabeled.vit import VisionTransformer, vit_config
from unlabeled.weights.huggingface import save_huggingface

transformers = pytest.importorskip("transformers")

# size, registers, depth, (height, width, masked)
SOME = [
    ("vit_small", 0, 12, [(224, 224, False), (98, 154, True)]),
    ("vit_small", 4, 12, [(98, 154, False), (224, 224, True)]),
    ("vit_small", 0, 3, [(518, 518, False)]),
    ("vit_base", 0, 12, [(98, 154, False), (98, 154, True)]),
    ("vit_base", 4, 12, [(224, 224, False)]),
    ("vit_large", 4, 24, [(98, 154, False), (98, 98, True)]),
    ("vit_large", 0, 2, [(224, 224, False)]),
    ("vit_giant2", 0, 2, [(98, 154, False), (98, 154, True)]),
    ("vit_giant2", 4, 2, [(154, 98, False), (98, 98, True)]),
]
SIDES = [(224, 224), (224, 140), (518, 518), (518, 392)]
ALL = [
    (size, registers, depth, [(H, W, masked) for H, W in SIDES for masked in (False, True)])
    for size, depth in (("vit_small", 12), ("vit_base", 12), ("vit_large", 24), ("vit_giant2", 3))
    for registers in (0, 4)
]


def random_weights(size: str, num_registers: int, depth: int) -> VisionTransformer:
    """A model without its own initialisation, which takes longer than all else for the large ones."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = VisionTransformer(vit_config(size, num_registers=num_registers, depth=depth))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_matrix = parameter.dim() == 2 and "token" not in name
            bound = parameter.shape[-1] ** -0.5 if is_matrix else 0.3
            parameter.uniform_(-bound, bound)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model.eval()


@pytest.mark.parametrize(
    ("size", "num_registers", "depth", "images"),
    ALL if os.environ.get("UNLABELED_PARITY") == "all" else SOME,
    ids=lambda value: str(value).replace(" ", "") if isinstance(value, str | int) else "",
)
def test_released_sizes(size: str, num_registers: int, depth: int, images: list, tmp_path: Path) -> None:
    ours = random_weights(size, num_registers, depth)
    save_huggingface(ours, tmp_path)
    theirs = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    (tmp_path / "model.safetensors").unlink()  # pytest keeps folders, and this is up to 1.2 GB
    for H, W, masked in images:
        pixels = torch.randn(1, 3, H, W)
        with torch.no_grad():
            masks = torch.rand(1, (H // 14) * (W // 14)) < 0.4 if masked else None
            assert_same_hidden_states(ours, theirs, pixels, masks)
