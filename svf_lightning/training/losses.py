"""Losses of an episode. Pixels with the ignore label (255) are left out here."""

import torch
from torch import Tensor
from torch.nn import functional as F

from svf_lightning.episode import BACKGROUND, IGNORE, Episode, Prediction


def cross_entropy(
    prediction: Prediction,
    episode: Episode,
    foreground_weight: float = 1.0,
    auxiliary_weight: float = 1.0,
    void_is_background: bool = False,
) -> Tensor:
    """Pixel-wise cross-entropy of the main logits plus the mean of the auxiliary ones.

    Args:
        prediction: Main and auxiliary logits, each ``(B, 2, H, W)``.
        episode: Its ``query_mask`` ``(B, H, W)`` is the target; 255 does not count, unless
            ``void_is_background``.
        foreground_weight: Weight of a foreground pixel relative to a background one. Above 1 it
            speeds up learning where objects are small; the papers use 1.
        auxiliary_weight: Factor of the auxiliary term, 1 in PFENet.
        void_is_background: Take 255 for background, as HSNet's code does in training. There images
            are squashed to size; here it makes what pads a crop background, too.

    Returns:
        A scalar; zero, with a zero gradient, if every pixel is ignored.

    Source:
        Tian et al., PFENet, TPAMI 2020, equation 9 (both weights 1).
    """
    target = episode.query_mask
    if void_is_background:
        target = target.masked_fill(target == IGNORE, BACKGROUND)

    def term(logits: Tensor) -> Tensor:
        logits = _wide(logits)
        weight = logits.new_tensor([1.0, foreground_weight])
        total = F.cross_entropy(logits, target, weight, ignore_index=IGNORE, reduction="sum")
        counted = weight[0] * (target == 0).sum() + weight[1] * (target == 1).sum()
        return total / counted.clamp_min(1e-6)

    loss = term(prediction.logits)
    if prediction.auxiliary:
        auxiliary = torch.stack([term(logits) for logits in prediction.auxiliary.values()])
        loss = loss + auxiliary_weight * auxiliary.mean()
    return loss


def cyctr_dice(
    prediction: Prediction,
    episode: Episode,
    auxiliary_weight: float = 1.0,
    count_ignored: bool = True,
) -> Tensor:
    """Dice loss of the query, plus that of the supports segmented by the query.

    Background and foreground are two independent questions, each answered by a sigmoid.

    Args:
        prediction: Main logits ``(B, 2, H, W)``; ``auxiliary["support"]`` ``(B, K, 2, H, W)`` where the
            model is in training mode, else the main term is all.
        episode: Its query and support masks are the targets.
        auxiliary_weight: Factor of the support term, 1 in CyCTR.
        count_ignored: As published, 255 belongs to no target, but what is predicted there still counts in
            the denominator and is pushed to zero. False leaves those pixels out.

    Returns:
        A scalar in ``[0, 2 + 2 * auxiliary_weight]``, best 0.

    Source:
        Zhang et al., CyCTR, NeurIPS 2021, section 3.4; Milletari et al., V-Net, 3DV 2016 (squares).
    """

    def term(logits: Tensor, masks: Tensor) -> Tensor:
        p = _wide(logits).sigmoid()  # (N, 2, H, W)
        t = torch.stack([masks == 0, masks == 1], dim=1).to(p.dtype)
        square = p.square() if count_ignored else p.square() * (masks != IGNORE)[:, None]
        overlap, total = (p * t).sum(dim=(2, 3)), (square + t).sum(dim=(2, 3))  # t is its own square
        return (1 - 2 * overlap / total.clamp_min(1e-8)).sum(dim=1).mean()

    loss = term(prediction.logits, episode.query_mask)
    if "support" in prediction.auxiliary:
        supports = prediction.auxiliary["support"].flatten(0, 1)
        loss = loss + auxiliary_weight * term(supports, episode.support_masks.flatten(0, 1))
    return loss


def _wide(logits: Tensor) -> Tensor:
    """In float32 at least: half precision loses count over the pixels of an image."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
