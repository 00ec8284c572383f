"""Clipping of large singular values, of the convolution as an operator or of its kernel as a matrix.

A convolution maps whole feature maps, so it has far more singular values than its kernel read as an
``O x (I kh kw)`` matrix. With circular padding the Fourier transform splits it into one ``O x I`` matrix per
frequency, whose singular values together are those of the operator.

Source:
    Sedghi, Gupta and Long, The singular values of convolutional layers, ICLR 2019, arXiv:1805.10408;
    discussed by Sun et al., NeurIPS 2022, arXiv:2206.06122, who expect harm to a pretrained backbone and
    give no numbers. Written after the formulas. As there, clipping spreads a kernel over the whole map, and
    cutting it back to its size brings the norm up again, by a little. Stride and dilation are not modelled:
    a stride drops outputs and cannot raise the norm, a dilation visits the same frequencies in another
    order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from svf_lightning.finetune import full, svf
from svf_lightning.finetune.layers import LAYERS
from svf_lightning.svf.layer import SVFLayer


def prepare(
    backbone: nn.Module,
    stages: Sequence[str] = ("layer2", "layer3", "layer4"),
    train: str = "kernel",
    kernels: Sequence[str] | None = None,
) -> None:
    """Train what :func:`clip` will clip. Nothing is clipped yet: the backbone computes what it did.

    Args:
        backbone: Changed in place; calling again changes nothing.
        stages: Names of its submodules.
        train: "kernel", whole kernels, clipped as operators; or "s", singular values of the kernel's
            matrix, clipped one by one: the plain analogue.
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
def clip(backbone: nn.Module, limit: float = 1.0, size: int = 16) -> None:
    """Cut the singular values of every layer that trains at ``limit``.

    Args:
        backbone: Prepared by :func:`prepare`; its weights are changed in place.
        limit: Largest singular value that stays, more than 0.
        size: Height and width of the maps on which the operators act, at least that of the largest kernel.
            The cost is that of ``size ** 2 / 2`` decompositions per convolution; a larger map only samples
            the same frequency response more densely.
    """
    for layer in backbone.modules():
        if isinstance(layer, SVFLayer):
            if layer.s.requires_grad:
                layer.s.clamp_(-limit, limit)
        elif isinstance(layer, LAYERS) and layer.weight.requires_grad:
            weight = layer.weight if layer.weight.dim() > 2 else layer.weight[..., None]
            groups: int = getattr(layer, "groups", 1)
            clipped = torch.cat([clip_operator(group, limit, size) for group in weight.chunk(groups)])
            for axis, length in enumerate(weight.shape):
                clipped = clipped.narrow(axis, 0, length)
            layer.weight.copy_(clipped.view_as(layer.weight))


def operator_singular_values(kernel: Tensor, size: int) -> Tensor:
    """All singular values of a convolution on circular maps, in no order, shape ``(size ** 2 * min(O, I),)``.

    Args:
        kernel: Shape ``(O, I, *kernel)``, of a convolution without groups and of stride 1.
        size: Height and width of the maps.

    Example:
        >>> blur = torch.tensor([[[0.5, 0.5]]])  # one channel, one dimension
        >>> operator_singular_values(blur, size=2)
        tensor([1., 0.])
    """
    axes = list(range(2, kernel.dim()))
    response = torch.fft.fftn(kernel, s=[size] * len(axes), dim=axes)
    return torch.linalg.svdvals(response.movedim((0, 1), (-2, -1))).flatten()


def clip_operator(kernel: Tensor, limit: float, size: int) -> Tensor:
    """The kernel of the nearest convolution, on circular maps, whose operator norm is at most ``limit``.

    Args:
        kernel: Shape ``(O, I, *kernel)``, of a convolution without groups and of stride 1.
        limit: Largest singular value that stays.
        size: Height and width of the maps, at least the kernel's.

    Returns:
        A kernel as large as the map along every axis on which ``kernel`` has more than one tap, shape
        ``(O, I, size, size)`` for most; the first taps are those of ``kernel``.

    Raises:
        ValueError: If the kernel is larger than the map.
    """
    axes = list(range(2, kernel.dim()))
    if max(kernel.shape[2:]) > size:
        raise ValueError(f"size is {size}, but a kernel has shape {tuple(kernel.shape)}; give a larger size")
    # An axis with one tap has the same response at all frequencies.
    sizes = [size if kernel.shape[axis] > 1 else 1 for axis in axes]
    response = torch.fft.rfftn(kernel.double(), s=sizes, dim=axes).movedim((0, 1), (-2, -1))  # (..., O, I)
    u, s, vh = torch.linalg.svd(response, full_matrices=False)
    clipped = (u * s[..., None, :].clamp(max=limit)) @ vh
    return torch.fft.irfftn(clipped.movedim((-2, -1), (0, 1)), s=sizes, dim=axes).to(kernel.dtype)
