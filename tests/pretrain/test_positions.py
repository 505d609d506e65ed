"""The position embedding that knows where a patch is."""

import math

import pytest
import torch

from unlabeled.errors import UserError
from unlabeled.pretrain.method import Network
from unlabeled.pretrain.positions import SCALE, sine_positions
from unlabeled.pretrain.recipe import override
from unlabeled.pretrain.recipes import named_recipe


def test_sines_of_row_and_column() -> None:
    side, width = 5, 16
    found = sine_positions(side, width)
    assert found.shape == (1, 25, 16)
    for row in range(side):
        for column in range(side):
            for index in range(4):
                rate = 10_000 ** -(index / 4)
                expected = [f(rate * place) for place in (row, column) for f in (math.sin, math.cos)]
                values = found[0, row * side + column, index::4]
                assert values.tolist() == pytest.approx([SCALE * value for value in expected], abs=1e-6)


def test_a_recipe_asks_for_it() -> None:
    recipe = override(named_recipe("tiny"), {"model.positions": "sine", "model.depth": 1}, "test")
    network = Network(recipe, drop_path=0.0)
    side = recipe.crops.global_size // recipe.model.patch_size
    assert torch.equal(network.backbone.pos_embed[:, 1:], sine_positions(side, 192))
    with pytest.raises(UserError, match="a width that 4 divides"):
        override(recipe, {"model.width": 30, "model.num_heads": 2}, "test")
