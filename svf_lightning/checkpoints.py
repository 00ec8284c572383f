"""Official checkpoints in, our models out."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svf_lightning.backbones.backbone import Backbone


def from_official(
    method: str,
    state_dict: Mapping[str, Tensor],
    *,
    backbone: str = "resnet50",
    shot: int = 1,
) -> nn.Module:
    """Build our model with the weights of an official checkpoint.

    Dilation scheme and options are those of the official code, since a checkpoint loads into the
    wrong scheme without a sign and gives wrong features.

    Args:
        method: "baseline" (``aspp.py`` of zechao-li/SVF-few-shot-segmentation).
        state_dict: The checkpoint, or its ``state_dict`` entry; a ``module.`` prefix is removed.
            Plain, or with SVF factors (``conv_V.weight``, ``vector_S``, ``conv_U.weight``), of whatever
            rank they are: the official code cuts the stem's 27 to 24.
        backbone: "resnet50", "resnet101" or "vgg16".
        shot: Supports per episode that the checkpoint was trained for.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: For an unknown method or backbone, or naming the keys that are missing, left over
            or of another shape.
    """
    if method not in OFFICIAL:
        raise ValueError(f"method must be one of {sorted(OFFICIAL)}, got {method!r}")
    state = {key.removeprefix("module."): value for key, value in state_dict.get("state_dict", state_dict).items()}
    return OFFICIAL[method](state, backbone, shot).eval()
