"""Read weight files and load them into a network; every key and shape must fit."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn


def read_state_dict(path: str | Path, fetch: str) -> dict[str, Tensor]:
    """Read a state dict from a file, whether it lies bare or inside a checkpoint.

    A dict under ``"state_dict"`` is unwrapped and ``"module."``, which (Distributed)DataParallel
    puts before every key, is taken off. Nothing but tensors and plain containers is unpickled.

    Args:
        path: The file.
        fetch: Which file that is and who publishes it, for the message when it is missing.

    Returns:
        Key to tensor, on the CPU, in the file's order.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or does not hold a state dict.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"no weight file at {path.absolute()}; "
            f"fetch {fetch} and put it there, or set weights to the path of your copy"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make torch.load raise half a dozen unrelated types
        # torch's own message is left out: it advises to load the file without weights_only
        raise ValueError(
            f"{path} is damaged or holds more than tensors ({type(error).__name__}); fetch {fetch} again"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict (names with tensors); fetch {fetch}")
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load ``state`` into ``module`` if all keys and shapes agree, else change nothing.

    Only BatchNorm's step counters may be missing: files older than PyTorch 0.4.1 have none, and
    with fixed statistics nobody reads them.

    Args:
        module: What to fill.
        state: Key to tensor, in the names of ``module``.
        source: Where the tensors come from, for the message.

    Raises:
        ValueError: At the first key that is missing, unexpected or has another shape.
    """
    wanted = module.state_dict()
    for key, tensor in wanted.items():
        if key not in state:
            if key.endswith("num_batches_tracked"):
                continue
            raise ValueError(f"{source} has no {key!r}; it holds the weights of another network")
        if state[key].shape != tensor.shape:
            raise ValueError(
                f"{source} has {key!r} of shape {tuple(state[key].shape)} where the network needs "
                f"{tuple(tensor.shape)}; it holds the weights of another network"
            )
    for key in state:
        if key not in wanted:
            raise ValueError(f"{source} has an unexpected {key!r}; it holds the weights of another network")
    module.load_state_dict({**wanted, **state})


def download(fetch: Callable[[], dict[str, Tensor]], source: str) -> dict[str, Tensor]:
    """Call ``fetch``, and if the network is to blame say so in one line.

    Args:
        fetch: Downloads a state dict, or finds it in a cache.
        source: The address, for the message.

    Raises:
        FileNotFoundError: If the download fails.
    """
    try:
        return fetch()
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash a RuntimeError
        raise FileNotFoundError(
            f"cannot download {source} ({error}); fetch it elsewhere and set weights to its path"
        ) from error
