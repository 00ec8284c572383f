"""BatchNorm tuning: its scale and shift train; its statistics stay those of the pretraining.

Source:
    Sun et al., NeurIPS 2022, arXiv:2206.06122, Table 10 (scale, shift, both) and Table 5 (both, together
    with the singular values). The paper does not say in which stages; here in those where it trains the
    singular values.
"""

from collections.abc import Sequence

from torch import nn

from svf_lightning.backbones.backbone import is_batch_norm
from svf_lightning.finetune import svf as singular_values
from svf_lightning.finetune.layers import in_stages


def prepare(
    backbone: nn.Module,
    stages: Sequence[str] = ("layer2", "layer3", "layer4"),
    train: Sequence[str] = ("weight", "bias"),
    svf: bool = False,
) -> None:
    """Train the scale ("weight"), the shift ("bias") or both of every BatchNorm of some stages.

    Args:
        backbone: Changed in place; calling again changes nothing.
        stages: Names of its submodules.
        train: What trains, from "weight" and "bias".
        svf: Train the singular values of these stages, too.

    Raises:
        ValueError: If a stage does not exist or holds no BatchNorm with scale and shift, or ``train`` names
            something else.
    """
    if not train or set(train) - {"weight", "bias"} or isinstance(train, str):
        raise ValueError(f"train must be a list of 'weight', 'bias' or both; got {train!r}")
    layers: list[nn.Module] = []
    for stage, modules in in_stages(backbone, stages).items():
        found = [m for m in modules.values() if is_batch_norm(m) and m.weight is not None]
        if not found:
            raise ValueError(
                f"stages: {stage!r} holds no BatchNorm with a scale and shift to train; "
                "leave it out, or choose another strategy than bn"
            )
        layers += found
    if svf:
        singular_values.prepare(backbone, stages)
    else:
        backbone.requires_grad_(False)
    for layer in layers:
        for name in train:
            layer.get_parameter(name).requires_grad_(True)
