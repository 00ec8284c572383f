"""Full fine-tuning: the convolutions themselves train.

Source:
    Sun et al., NeurIPS 2022, arXiv:2206.06122, Tables 6 and 7, where it loses to the frozen backbone on
    novel classes. The rows of the paper's tables count convolutions and do not mention BatchNorm, whose own
    tuning is a separate row (Tables 5 and 10). So BatchNorm's scale and shift stay frozen here, unless
    asked for; its statistics are fixed by the backbone whatever is chosen here.
"""

from collections.abc import Sequence

from torch import nn

from svf_lightning.backbones.backbone import is_batch_norm
from svf_lightning.finetune.layers import in_stages, select


def prepare(
    backbone: nn.Module,
    stages: Sequence[str] = ("layer1", "layer2", "layer3", "layer4"),
    batch_norm: bool = False,
    kernels: Sequence[str] | None = None,
) -> None:
    """Train weight and bias of every convolution and linear layer of some stages, nothing else.

    Args:
        backbone: Changed in place; calling again changes nothing.
        stages: Names of its submodules. The paper's "part" fine-tuning is a shorter list.
        batch_norm: Train the scale and shift of BatchNorm in these stages, too.
        kernels: Kernel sizes that train, such as "3x3"; linear layers count as "1x1". None means all.

    Raises:
        ValueError: If a stage does not exist or holds nothing to train, or none has one of the kernel sizes.
    """
    layers = list(select(backbone, stages, kernels).values())
    if batch_norm:
        for modules in in_stages(backbone, stages).values():
            layers += [m for m in modules.values() if is_batch_norm(m)]
    backbone.requires_grad_(False)
    for layer in layers:
        layer.requires_grad_(True)
