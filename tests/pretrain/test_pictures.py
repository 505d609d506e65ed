"""The pictures of a run."""

from pathlib import Path

import numpy as np
from PIL import Image

from unlabeled.images.sources import open_source
from unlabeled.pretrain.crops import draw_parameters
from unlabeled.pretrain.pictures import loss_curves, neighbours, pca
from unlabeled.pretrain.recipes import named_recipe
from unlabeled.pretrain.show_crops import draw_crops
from unlabeled.vit import VisionTransformer, VitConfig


def test_very_long_images_are_shown_by_their_middle(tmp_path: Path, photograph: np.ndarray) -> None:
    """A strip of 3000 x 3 pixels, enlarged whole, was a quarter of a million patches."""
    tile = Image.fromarray(photograph[:64, :64])
    for name, size in (("a", (3000, 3)), ("b", (2, 2500)), ("c", (64, 64))):
        tile.resize(size).save(tmp_path / f"{name}.png")
    model = VisionTransformer(VitConfig(width=32, depth=1, num_heads=2, patch_size=8, image_size=32)).eval()
    source = open_source(tmp_path)
    figure = pca(model, source, 32)
    assert len(figure.axes) == 2 * 3  # three images are not shown eight times
    shapes = [axes.images[0].get_size() for axes in figure.axes[:3]]
    assert shapes == [(64, 256), (256, 64), (64, 64)]
    assert len(neighbours(model, source, 32).axes) == 9


def test_no_legend_lies_over_a_curve() -> None:
    names = ("loss", "dino", "ibot", "koleo", "teacher_entropy", "target_entropy", "rankme", "lr", "knn")
    figure = loss_curves([{"step": step} | dict.fromkeys(names, 4.0) for step in range(5)])
    figure.draw_without_rendering()
    legends = [(axes, axes.get_legend()) for axes in figure.axes if axes.get_legend()]
    assert len(figure.axes) == 5
    assert len(legends) == 2
    for axes, legend in legends:
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())
        assert not any(
            legend.get_window_extent().overlaps(axes.xaxis.label.get_window_extent()) for axes in figure.axes
        )
    low, high = figure.axes[1].get_ylim()
    assert low == 0
    assert high > 4


def test_crops_are_drawn_where_they_were_taken(photograph: np.ndarray) -> None:
    recipe = named_recipe("tiny").crops
    image = np.ascontiguousarray(photograph[:200, :300])
    figure = draw_crops(image, recipe, seed=3)
    whole, *grid = figure.get_axes()
    parameters = draw_parameters(200, 300, recipe, np.random.default_rng(3))
    boxes = [(*box.get_xy(), box.get_width(), box.get_height()) for box in whole.patches]
    assert boxes == [tuple(row[name] for name in ("left", "top", "width", "height")) for row in parameters]
    names = ["global 1", "global 2", "local 1", "local 2", "local 3", "local 4"]
    assert [text.get_text() for text in whole.texts] == names
    shown = [axes for axes in grid if axes.images]
    assert [axes.get_title().split(",")[0] for axes in shown] == names
    assert [axes.images[0].get_size() for axes in shown] == [(128, 128)] * 2 + [(64, 64)] * 4
    for text in whole.texts:  # the names of the two kinds stand in other corners
        assert (text.get_ha(), text.get_va()) == (
            ("right", "bottom") if "global" in text.get_text() else ("left", "top")
        )
