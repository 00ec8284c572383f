"""Singular value bounding: every few steps the singular values are pushed into a narrow band around 1.

Made for training from scratch. On a pretrained backbone, whose spectra spread over [0, 2], the paper
expects harm, and gives no numbers.

Source:
    Jia, Tao, Gao and Xu, Improving training of deep neural networks via singular value bounding, CVPR 2017,
    arXiv:1611.06013; discussed by Sun et al., NeurIPS 2022, arXiv:2206.06122. Written after the formula.
    The bound is theirs; how often it acts on a fine-tuned backbone is our choice.
"""

from collections.abc import Sequence

import torch
from torch import nn

from svf_lightning.finetune import full, svf
from svf_lightning.finetune.layers import LAYERS
from svf_lightning.svf.layer import SVFLayer


def prepare(
    backbone: nn.Module,
    stages: Sequence[str] = ("layer2", "layer3", "layer4"),
    train: str = "s",
    kernels: Sequence[str] | None = None,
) -> None:
    """Train what :func:`bound` will bound. Nothing is bounded yet: the backbone computes what it did.

    Args:
        backbone: Changed in place; calling again changes nothing.
        stages: Names of its submodules.
        train: "s", the singular values alone, or "kernel", the whole kernels as Jia et al. do.
        kernels: Kernel sizes that train, such as "3x3"; linear layers count as "1x1". None means all.

    Raises:
        ValueError: If a stage does not exist or holds nothing to train, none has one of the kernel sizes,
            or ``train`` is neither of the two.
    """
    if train not in ("s", "kernel"):
        raise ValueError(f"train must be 's' or 'kernel', got {train!r}")
    if train == "s":
        svf.prepare(backbone, stages, kernels=kernels)
    else:
        full.prepare(backbone, stages, kernels=kernels)


@torch.no_grad()
def bound(backbone: nn.Module, epsilon: float = 0.05) -> None:
    """Bring the singular values of every layer that trains into ``[1 / (1 + epsilon), 1 + epsilon]``.

    Args:
        backbone: Prepared by :func:`prepare`; its weights are changed in place.
        epsilon: Half width of the band, more than 0.
    """
    low, high = 1 / (1 + epsilon), 1 + epsilon
    for layer in backbone.modules():
        if isinstance(layer, SVFLayer):
            if layer.s.requires_grad:
                layer.s.clamp_(low, high)
        elif isinstance(layer, LAYERS) and layer.weight.requires_grad:
            factored = SVFLayer(layer)
            factored.s.clamp_(low, high)
            layer.weight.copy_(factored.weight)
