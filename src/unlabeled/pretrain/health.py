"""Signs of life of a run: are targets informative, prototypes in use, features spread out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unlabeled.evaluate.health import rankme
from unlabeled.pretrain.parallel import Parallel


@torch.no_grad()
def figures(targets_VBK: Tensor, cls_VBD: Tensor, parallel: Parallel) -> dict[str, float]:
    """The dearer figures of one step, over all ranks; every rank calls it.

    Args:
        targets_VBK: (2B, K) float32, the teacher's probabilities for the global crops.
        cls_VBD: (2B, D), the teacher's CLS tokens.
        parallel: the ranks.

    Returns:
        teacher_entropy: mean entropy of one target in nats, in [0, log K];
        target_entropy: entropy of the mean target, in [0, log K];
        prototypes_used: share of the prototypes that are the most likely one of some crop, of those that could be
            (no more than there are crops), in [0, 1];
        rankme: effective rank of the CLS tokens (2210.02885), in [1, min(2B, D)]; NaN where they are not finite.
    """
    num_crops, num_prototypes = targets_VBK.shape
    entropy = torch.special.entr(targets_VBK).sum(1).mean()
    marginal = targets_VBK.mean(0)
    means = parallel.mean({"entropy": entropy})
    if parallel.distributed:
        torch.distributed.all_reduce(marginal)
        marginal /= parallel.world
    best, all_cls = parallel.gather(targets_VBK.argmax(1)), parallel.gather(cls_VBD.float())
    possible = min(num_prototypes, num_crops * parallel.world)
    return {
        "teacher_entropy": float(means["entropy"]),
        "target_entropy": float(torch.special.entr(marginal).sum()),
        "prototypes_used": best.unique().numel() / possible,
        "rankme": rankme(all_cls) if all_cls.isfinite().all() else math.nan,
    }


class CollapseWatch:
    """Says in words when the features start to collapse, once each time it starts."""

    def __init__(self, num_prototypes: int) -> None:
        self.highest = math.log(num_prototypes)
        self.now: set[str] = set()

    def check(self, row: dict[str, float]) -> list[str]:
        """The warnings that this row of figures gives rise to and the one before did not."""
        signs = {
            "uniform": (
                row["teacher_entropy"] > 0.99 * self.highest,
                f"the teacher's targets are uniform (entropy {row['teacher_entropy']:.2f} of at most "
                f"{self.highest:.2f}): nothing is learned from them; lower teacher.temperature",
            ),
            "constant": (
                row["target_entropy"] < 0.02 * self.highest,
                f"all images get the same target (entropy of their mean {row['target_entropy']:.3f}): "
                "the features collapse; lower optimizer.lr, or use loss.targets sinkhorn",
            ),
            "rank": (
                row["rankme"] < 1.5,
                f"the features lie along one direction (RankMe {row['rankme']:.2f}): "
                "they collapse; lower optimizer.lr or raise loss.koleo",
            ),
        }
        started = [text for name, (on, text) in signs.items() if on and name not in self.now]
        self.now = {name for name, (on, _) in signs.items() if on}
        return started
