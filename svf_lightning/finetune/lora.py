"""Low-rank adaptation: ``W + (alpha / r) B A`` with W frozen, and its variant DoRA, through peft.

A convolution's ``A`` is a convolution of the same kernel size into r channels, ``B`` a 1x1 convolution. B is
zero at first. DoRA trains the length of every output channel's kernel apart from its direction.

Source:
    Hu et al., LoRA, ICLR 2022, arXiv:2106.09685; Liu et al., DoRA, ICML 2024, arXiv:2402.09353. The layers
    are those of huggingface/peft (Apache-2.0), which is imported, not copied: `pip install
    svf-lightning[peft]`. It forgets dilation and padding mode of a convolution (in 0.21); that is mended
    here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from svf_lightning.finetune.layers import select


def prepare(
    backbone: nn.Module,
    stages: Sequence[str] = ("layer2", "layer3", "layer4"),
    rank: int = 8,
    alpha: float = 8,
    dora: bool = False,
    kernels: Sequence[str] | None = None,
    seed: int = 0,
) -> None:
    """Train a low-rank correction of every convolution and linear layer of some stages.

    Grouped and depthwise convolutions are left frozen: the kernel of a group has hardly more than one row,
    so there is no low rank to train. :func:`merge` folds the corrections into the kernels.

    Args:
        backbone: Changed in place; calling again changes nothing.
        stages: Names of its submodules.
        rank: r of the correction.
        alpha: The correction's factor is ``alpha / rank``.
        dora: Also train the lengths (DoRA).
        kernels: Kernel sizes to adapt, such as "3x3"; linear layers count as "1x1". None means all.
        seed: Of the random A.

    Raises:
        ValueError: If peft is missing, a stage does not exist or holds nothing to adapt, or no layer has one
            of the kernel sizes.
    """
    peft = _peft()
    if not _adapters(backbone):
        layers = select(backbone, stages, kernels)
        names = [name for name, layer in layers.items() if getattr(layer, "groups", 1) == 1]
        if not names:
            raise ValueError(f"stages: {', '.join(stages)} hold grouped convolutions only; choose others")
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            use_dora=dora,
            target_modules="|".join(name.replace(".", r"\.") for name in names),  # a pattern: no near matches
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, backbone)
        for adapter in _adapters(backbone):
            _match_geometry(adapter)
    backbone.requires_grad_(False)
    for adapter in _adapters(backbone):
        for name, parameter in adapter.named_parameters():
            parameter.requires_grad_(not name.startswith("base_layer."))


def merge(backbone: nn.Module) -> None:
    """Fold the corrections into the kernels; every layer becomes the plain one that it was."""
    adapters: set[Any] = set(_adapters(backbone))
    for name, module in list(backbone.named_modules(remove_duplicate=False)):
        if module in adapters:
            module.merge()
            backbone.set_submodule(name, module.get_base_layer())


def _match_geometry(adapter: Any) -> None:
    """Let a convolution's A look at the pixels that the convolution looks at."""
    plain = adapter.get_base_layer()
    if isinstance(plain, nn.Linear):
        return
    for a in adapter.lora_A.values():
        for name in ("dilation", "padding_mode", "_reversed_padding_repeated_twice"):
            setattr(a, name, getattr(plain, name))


def _adapters(backbone: nn.Module) -> list[Any]:
    peft = _peft()
    return [module for module in backbone.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError(
            "finetune=lora and dora need peft, which is not installed; pip install 'svf-lightning[peft]'"
        ) from None
    return peft
