"""Losses of an episode. The ignore label is handled here and nowhere else."""

import torch
from torch import Tensor
from torch.nn import functional as F

from svf_lightning.episode import IGNORE, Episode, Prediction


def cross_entropy(
    prediction: Prediction,
    episode: Episode,
    foreground_weight: float = 1.0,
    auxiliary_weight: float = 1.0,
) -> Tensor:
    """Pixel-wise cross-entropy of the main logits plus the mean of the auxiliary ones.

    Args:
        prediction: Main and auxiliary logits, each ``(B, 2, H, W)``.
        episode: Its ``query_mask`` ``(B, H, W)`` is the target; 255 does not count.
        foreground_weight: Weight of a foreground pixel relative to a background one. Above 1 it
            speeds up learning where objects are small; the papers use 1.
        auxiliary_weight: Factor of the auxiliary term, 1 in PFENet.

    Returns:
        A scalar; zero, with a zero gradient, if every pixel is ignored.

    Source:
        Tian et al., PFENet, TPAMI 2020, equation 9 (both weights 1).
    """
    target = episode.query_mask

    def term(logits: Tensor) -> Tensor:
        weight = logits.new_tensor([1.0, foreground_weight])
        total = F.cross_entropy(logits, target, weight, ignore_index=IGNORE, reduction="sum")
        counted = weight[0] * (target == 0).sum() + weight[1] * (target == 1).sum()
        return total / counted.clamp_min(1e-6)

    loss = term(prediction.logits)
    if prediction.auxiliary:
        auxiliary = torch.stack([term(logits) for logits in prediction.auxiliary.values()])
        loss = loss + auxiliary_weight * auxiliary.mean()
    return loss
