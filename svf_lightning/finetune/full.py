"""Full fine-tuning: the convolutions themselves train.

Source:
    Sun et al., NeurIPS 2022, arXiv:2206.06122, Table 6, where it loses to the frozen backbone on novel
    classes. The rows of the paper's tables count convolutions and do not mention BatchNorm, whose own
    tuning is a separate row (Tables 5 and 10). So BatchNorm's scale and shift stay frozen here, unless
    asked for; its statistics are fixed by the backbone whatever is chosen here.
"""

from collections.abc import Sequence

from torch import nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def prepare(
    backbone: nn.Module,
    stages: Sequence[str] = ("layer1", "layer2", "layer3", "layer4"),
    batch_norm: bool = False,
) -> None:
    """Train weight and bias of every convolution and linear layer of some stages, nothing else.

    Args:
        backbone: Changed in place; calling again changes nothing.
        stages: Names of its submodules. The paper's "part" fine-tuning is a shorter list.
        batch_norm: Train the scale and shift of BatchNorm in these stages, too.

    Raises:
        ValueError: If a stage does not exist or holds nothing to train.
    """
    backbone.requires_grad_(False)
    modules = dict(backbone.named_modules())
    for stage in stages:
        if stage not in modules:
            known = ", ".join(name for name, _ in backbone.named_children())
            raise ValueError(f"stages: the backbone has no {stage!r}; it has {known}")
        layers = [m for m in modules[stage].modules() if isinstance(m, _CONVOLUTIONS)]
        if not layers:
            raise ValueError(f"stages: {stage!r} holds no convolution to train; leave it out")
        if batch_norm:
            layers += [m for m in modules[stage].modules() if "BatchNorm" in type(m).__name__]
        for layer in layers:
            layer.requires_grad_(True)
