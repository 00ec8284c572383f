"""Singular value fine-tuning as a strategy: which layers are factored, and which factors train."""

from collections.abc import Sequence

import torch
from torch import nn

from svf_lightning.finetune.layers import select
from svf_lightning.svf.layer import SVFLayer
from svf_lightning.svf.network import FACTORABLE, apply_svf


def prepare(
    backbone: nn.Module,
    stages: Sequence[str] = ("layer2", "layer3", "layer4"),
    train: Sequence[str] = ("s",),
    kernels: Sequence[str] | None = None,
    parametrization: str = "s",
    rank: int | None = None,
) -> None:
    """Train the singular values, or other factors, of some stages and nothing else in the backbone.

    Only these layers are decomposed: a frozen layer gains nothing from factors and would lose speed.

    Args:
        backbone: Changed in place; calling again changes nothing.
        stages: Names of its submodules. The default is the authors'; Table 9 of the paper compares others.
        train: Which factors train, from "u", "s", "v" (Table 8). Nothing keeps "u" and "v" orthogonal.
        kernels: Kernel sizes to factor, such as "3x3"; linear layers count as "1x1". None means all.
        parametrization: Of the values: "s"; "exp" trains ``a`` in ``s * exp(a)``, so that a large value
            moves further and none changes its sign; "both" trains ``s`` and ``a`` (Table 12). Weight decay
            pulls ``s`` to zero, but ``a`` back to the pretrained network.
        rank: Factor only the largest values of each layer, that many; see :func:`apply_svf`.

    Raises:
        ValueError: If a stage does not exist or holds nothing to factor, a layer in it cannot be factored
            or has a lower rank, no layer has one of the kernel sizes, or ``train`` or ``parametrization``
            is none of the above.
    """
    if not train or set(train) - {"u", "s", "v"} or isinstance(train, str):
        raise ValueError(f"train must be a list of factors from u, s, v; got {train!r}")
    if parametrization not in ("s", "exp", "both") or (parametrization != "s" and "s" not in train):
        raise ValueError(
            f"parametrization must be 's', 'exp' or 'both', the latter two with 's' in train; "
            f"got {parametrization!r} with train={list(train)}"
        )
    names = list(select(backbone, stages, kernels, kinds=FACTORABLE))
    apply_svf(backbone, names, rank)
    backbone.requires_grad_(False)
    for name in names:
        layer = backbone.get_submodule(name)
        assert isinstance(layer, SVFLayer)
        _train_factors(layer, train, parametrization)


def _train_factors(layer: SVFLayer, train: Sequence[str], parametrization: str) -> None:
    """Let some factors of a layer train. A factor that trains is a parameter, one that does not a buffer."""
    for name, factor in (("u", "u"), ("vh", "v")):
        tensor = getattr(layer, name)
        if (factor in train) != isinstance(tensor, nn.Parameter):
            delattr(layer, name)
            if factor in train:
                layer.register_parameter(name, nn.Parameter(tensor))
            else:
                layer.register_buffer(name, tensor.detach())
    if parametrization != "s" and layer.a is None:
        layer.a = nn.Parameter(torch.zeros_like(layer.s))
    for name, factor in (("u", "u"), ("vh", "v")):
        getattr(layer, name).requires_grad_(factor in train)
    layer.s.requires_grad_("s" in train and parametrization != "exp")
    if layer.a is not None:
        layer.a.requires_grad_(parametrization != "s")
