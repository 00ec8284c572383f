"""Bias tuning: every additive constant of some stages trains, nothing else.

Source:
    Ben Zaken, Goldberg and Ravfogel, BitFit, ACL 2022, arXiv:2106.10199, where it tunes transformers. In a
    ResNet the convolutions have no bias, so there it is the tuning of BatchNorm's shift.
"""

from collections.abc import Sequence

from torch import nn

from svf_lightning.finetune.layers import in_stages


def prepare(backbone: nn.Module, stages: Sequence[str] = ("layer2", "layer3", "layer4")) -> None:
    """Train the biases of convolutions, linear layers and norms of some stages.

    Args:
        backbone: Changed in place; calling again changes nothing.
        stages: Names of its submodules.

    Raises:
        ValueError: If a stage does not exist or has no bias.
    """
    biases: list[nn.Parameter] = []
    for stage, modules in in_stages(backbone, stages).items():
        found = [bias for module in modules.values() if (bias := module._parameters.get("bias")) is not None]
        if not found:
            raise ValueError(f"stages: {stage!r} has no bias to train; leave it out")
        biases += found
    backbone.requires_grad_(False)
    for bias in biases:
        bias.requires_grad_(True)
