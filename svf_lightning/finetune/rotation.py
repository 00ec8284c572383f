"""Scaling in a random basis: ``R diag(t) R^T W`` with a fixed random rotation ``R``; only ``t`` trains.

It has as many numbers as a scale per output channel, but acts along directions that mean nothing. The
paper's worst row: what singular values give is not only that they are few.

Source:
    Sun et al., NeurIPS 2022, arXiv:2206.06122, Table 13. How R is drawn is not said there; here it is
    uniform over the orthogonal matrices (Haar): the QR decomposition of a Gaussian matrix, made unique by a
    positive diagonal of the triangle (Mezzadri, Notices of the AMS 54(5), 2007). So half of them reflect.
    Not in the authors' code; written after the text.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from svf_lightning.finetune.layers import LAYERS, select
from svf_lightning.svf.layer import SVFLayer, from_factors


def prepare(
    backbone: nn.Module,
    stages: Sequence[str] = ("layer2", "layer3", "layer4"),
    seed: int = 0,
    kernels: Sequence[str] | None = None,
) -> None:
    """Train one factor per rotated output channel of every convolution and linear layer of some stages.

    The layer that does it is SVF's, given R for U, ones for s, and ``R^T W`` for V^T. So what is said of
    that layer about speed, checkpoints and merging holds here, too; R is saved with it.

    Args:
        backbone: Changed in place; calling again changes nothing.
        stages: Names of its submodules.
        seed: Of the rotations.
        kernels: Kernel sizes to rotate, such as "3x3"; linear layers count as "1x1". None means all.

    Raises:
        ValueError: If a stage does not exist or holds nothing to rotate, or no layer has one of the sizes.
    """
    layers = select(backbone, stages, kernels, kinds=(*LAYERS, SVFLayer))
    generator = torch.Generator().manual_seed(seed)
    rotated = {
        plain: _rotated(plain, generator) for plain in layers.values() if not isinstance(plain, SVFLayer)
    }
    for name, module in list(backbone.named_modules(remove_duplicate=False)):
        if module in rotated:
            backbone.set_submodule(name, rotated[module])
    backbone.requires_grad_(False)
    for name in layers:
        backbone.get_parameter(f"{name}.s").requires_grad_(True)


def haar(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix ``(size, size)`` in float64, uniformly distributed.

    Example:
        >>> r = haar(3, torch.Generator().manual_seed(0))
        >>> torch.allclose(r @ r.T, torch.eye(3, dtype=torch.float64))
        True
    """
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def _rotated(plain: nn.Module, generator: torch.Generator) -> SVFLayer:
    """The layer as ``R diag(1) (R^T W)``, with one rotation per group."""
    weight, groups = plain.get_parameter("weight").detach(), getattr(plain, "groups", 1)
    rotations, rotated = [], []
    for kernel in weight.to("cpu", torch.float64).flatten(1).chunk(groups):
        rotation = haar(len(kernel), generator)  # (O / groups, O / groups)
        rotations.append(rotation)
        rotated.append(rotation.T @ kernel)
    return from_factors(
        plain, torch.cat(rotations), torch.ones(len(weight), dtype=torch.float64), torch.cat(rotated)
    )
