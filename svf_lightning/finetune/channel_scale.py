"""Channel scales: one factor per row or per column of a kernel read as a matrix, without decomposing it.

``S'W`` scales the outputs of a convolution, ``W S'`` its inputs. Both are the paper's answer to the
question whether any cheap scaling of the weights would do as well as that of the singular values.

Source:
    Sun et al., NeurIPS 2022, arXiv:2206.06122, Table 11. There S' has as many rows as W has columns, which
    is one factor per input channel and kernel tap, although the text speaks of channels; both are here.
    Not in the authors' code; written after the text.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils import parametrize

from svf_lightning.finetune.layers import select

SIDES = ("output", "input_tap", "input")


class ChannelScale(nn.Module):
    """A factor on slices of a kernel: ``diag(t) W`` or ``W diag(t)``, ``t`` being all ones at first.

    Attributes:
        t: Factors, shape ``(O, 1, ...)`` for "output", ``(I, *kernel)`` for "input_tap" and
            ``(I, 1, ...)`` for "input".

    Args:
        weight: The kernel, shape ``(O, I / groups, *kernel)``.
        groups: Of the convolution. Each group has its own factors on its own inputs.
        side: One of "output", "input_tap", "input".
    """

    def __init__(self, weight: Tensor, groups: int, side: str) -> None:
        super().__init__()
        self.groups, self.side = groups, side
        outputs, inputs, *kernel = weight.shape
        ones = (1,) * len(kernel)
        shape = {
            "output": (outputs, *ones),
            "input_tap": (groups * inputs, *kernel),
            "input": (groups * inputs, *ones),
        }[side]
        self.t = nn.Parameter(weight.new_ones((shape[0], 1, *ones) if side == "output" else shape))

    def forward(self, weight: Tensor) -> Tensor:
        """Scale a kernel ``(O, I / groups, *kernel)``."""
        if self.side == "output":
            return weight * self.t
        per_group = self.t.unflatten(0, (self.groups, 1, -1))  # (groups, 1, I / groups, ...)
        return (weight.unflatten(0, (self.groups, -1)) * per_group).flatten(0, 1)


def prepare(
    backbone: nn.Module,
    stages: Sequence[str] = ("layer2", "layer3", "layer4"),
    side: str = "input_tap",
    kernels: Sequence[str] | None = None,
) -> None:
    """Train one factor per slice of every convolution and linear layer of some stages.

    Args:
        backbone: Changed in place; calling again changes nothing.
        stages: Names of its submodules.
        side: "output" is ``S'W``, one factor per output channel; "input_tap" is ``W S'``, one per input
            channel and kernel tap; "input" one per input channel.
        kernels: Kernel sizes to scale, such as "3x3"; linear layers count as "1x1". None means all.

    Raises:
        ValueError: If a stage does not exist or holds nothing to scale, no layer has one of the kernel
            sizes, or ``side`` is none of the three.
    """
    if side not in SIDES:
        raise ValueError(f"side must be one of {', '.join(SIDES)}; got {side!r}")
    layers = select(backbone, stages, kernels).values()
    for layer in layers:
        if not _scales(layer):
            weight: Tensor = layer.weight.detach()  # type: ignore[operator]
            scale = ChannelScale(weight, getattr(layer, "groups", 1), side)
            parametrize.register_parametrization(layer, "weight", scale)
    backbone.requires_grad_(False)
    for layer in layers:
        for scale in _scales(layer):
            scale.requires_grad_(True)


def _scales(layer: nn.Module) -> list[ChannelScale]:
    if not parametrize.is_parametrized(layer, "weight"):
        return []
    chain = layer.parametrizations["weight"]  # type: ignore[index]
    return [scale for scale in chain if isinstance(scale, ChannelScale)]
