"""The frozen backbone: the usual choice in few-shot segmentation, and the baseline of every comparison."""

from torch import nn


def prepare(backbone: nn.Module) -> None:
    """Train nothing in the backbone.

    Args:
        backbone: Changed in place; calling again changes nothing.
    """
    backbone.requires_grad_(False)
