"""Read checkpoints without running any code that they may contain, old ones included."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svf_lightning.backbones.efficientnet import rename_zoomed


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of Lightning.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the file is truncated or not a checkpoint of tensors and plain values.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; give the path of a .ckpt file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a broken file
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as a checkpoint ({reason}); is it truncated?") from None
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(
            f"{path} is no checkpoint of a run: it has no state_dict; `svf convert` takes others"
        )
    content["state_dict"] = rename_zoomed(content["state_dict"])  # as earlier versions called its tensors
    return content


def load_weights(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Fill a module with exactly the weights of a checkpoint.

    Raises:
        ValueError: If a name is missing, left over, or of another shape.
    """
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit this network: {' '.join(str(error).split())}") from None
