"""Memory a GPU needs for a recipe whose state is sharded over N of them: counted from the shapes, not measured.

python benchmarks/memory.py vitg14 --gigabytes 80
"""

import argparse
import dataclasses

import torch

from unlabeled.pretrain.auto import SPARE, images_that_fit
from unlabeled.pretrain.method import Network
from unlabeled.pretrain.recipe import Recipe
from unlabeled.pretrain.recipes import named_recipe

STATE = 4 * 4  # bytes a student's parameter: itself, its gradient, two moments
TEACHER = 4


def network_sizes(recipe: Recipe) -> tuple[int, int]:
    """Return the parameters of student and heads, and those of the largest piece that is gathered whole."""
    with torch.device("meta"):
        network = Network(recipe, drop_path=0.0)
    whole = sum(parameter.numel() for parameter in network.parameters())
    blocks = sum(parameter.numel() for parameter in network.backbone.blocks.parameters())
    block = sum(parameter.numel() for parameter in network.backbone.blocks[0].parameters())
    return whole, max(whole - blocks, block)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="vitg14")
    parser.add_argument("--gigabytes", type=float, default=80.0, help="memory of one GPU")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128])
    arguments = parser.parse_args()
    recipe = named_recipe(arguments.recipe)
    whole, gathered = network_sizes(recipe)
    print(f"{recipe.name}: {whole / 1e6:,.0f} M parameters with its heads, batch {recipe.run.batch_size}\n")
    print(
        "| GPUs | state a GPU, GB | images that fit: packed | in two passes | with checkpoint_blocks: packed "
        "| in two passes | images a GPU of the recipe |"
    )
    print("|---|---|---|---|---|---|---|")
    for gpus in arguments.gpus:
        state = (STATE + TEACHER) * whole / gpus + (2 * 4 * gathered if gpus > 1 else 0)
        # images_that_fit counts the state of one device; what sharding frees is memory for images.
        memory = 1e9 * arguments.gigabytes + ((STATE + TEACHER) * whole - state) * SPARE / 0.8
        cells = [
            images_that_fit(
                dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, checkpoint_blocks=again)),
                memory,
                packed,
            )
            if state * SPARE < 0.8e9 * arguments.gigabytes
            else 0
            for again in (False, True)
            for packed in (True, False)
        ]
        wanted = recipe.run.batch_size / gpus
        fits = " | ".join(str(cell or "none") for cell in cells)
        print(f"| {gpus} | {state / 1e9:.1f} | {fits} | {wanted:g} |")


if __name__ == "__main__":
    main()
