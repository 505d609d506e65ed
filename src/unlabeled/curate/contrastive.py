"""The loss of a copy detector (SSCD, 2202.10261, section 4): alike where a picture is shared, spread out elsewhere.

Shape suffixes: N views, D width of the descriptors, I images.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from unlabeled.pretrain.losses import koleo_loss


def contrastive_loss(descriptors_ND: Tensor, shares_NN: Tensor, temperature: float) -> Tensor:
    """-mean over pairs (i, p) that share an image of log(e_ip / (e_ip + sum over n that share none with i of e_in)).

    e_ij = exp(cosine of i and j / temperature). With two views of each image this is InfoNCE / NT-Xent (2002.05709);
    with collages, SSCD's loss of images with several positives. Pairs are averaged for each view, then over the views
    that have any.

    Args:
        descriptors_ND: of any length.
        shares_NN: bool, symmetric; the diagonal does not count.
        temperature: above 0.

    Returns:
        A scalar, in float32 or better.
    """
    z_ND = F.normalize(descriptors_ND.to(torch.promote_types(descriptors_ND.dtype, torch.float32)), dim=1)
    logits_NN = z_ND @ z_ND.T / temperature
    positives_NN = shares_NN & ~torch.eye(len(z_ND), dtype=torch.bool, device=z_ND.device)
    others_N = logits_NN.masked_fill(shares_NN, torch.finfo(logits_NN.dtype).min).logsumexp(1, keepdim=True)
    losses_NN = torch.logaddexp(logits_NN, others_N) - logits_NN
    counts_N = positives_NN.sum(1)
    means_N = (losses_NN * positives_NN).sum(1) / counts_N.clamp(min=1)
    return means_N.sum() / (counts_N > 0).sum().clamp(min=1)


def detector_loss(
    descriptors_ND: Tensor, shows_NI: Tensor, temperature: float, entropy_weight: float
) -> dict[str, Tensor]:
    """SSCD's loss: InfoNCE + entropy_weight * KoLeo, whose nearest is searched among views that share no image.

    Args:
        descriptors_ND: of any length.
        shows_NI: bool, which images each view shows (several, of collages).
        temperature: of the first.
        entropy_weight: of the second; 0 leaves it out.

    Returns:
        loss, contrastive and koleo, scalars.
    """
    shows = shows_NI.float()
    shares_NN = shows @ shows.T > 0
    contrastive = contrastive_loss(descriptors_ND, shares_NN, temperature)
    koleo = koleo_loss(descriptors_ND, left_out_BB=shares_NN)
    return {"loss": contrastive + entropy_weight * koleo, "contrastive": contrastive, "koleo": koleo}
