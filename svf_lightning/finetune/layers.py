"""Find the layers that a strategy trains: those of given stages and kernel sizes."""

from collections.abc import Sequence

from torch import nn

from svf_lightning.svf.network import modules_under

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def in_stages(backbone: nn.Module, stages: Sequence[str]) -> dict[str, dict[str, nn.Module]]:
    """For each stage all modules at or below it, by their full names.

    Raises:
        ValueError: If a stage does not exist.
    """
    for stage in stages:
        if stage not in dict(backbone.named_modules(remove_duplicate=False)):
            known = ", ".join(name for name, _ in backbone.named_children())
            raise ValueError(f"stages: the backbone has no {stage!r}; it has {known}")
    return {stage: dict(modules_under(backbone, stage)) for stage in stages}


def select(
    backbone: nn.Module,
    stages: Sequence[str],
    kernels: Sequence[str] | None = None,
    kinds: tuple[type[nn.Module], ...] = LAYERS,
) -> dict[str, nn.Module]:
    """Convolutions and linear layers by name, in the order of the network.

    Args:
        backbone: A network.
        stages: Names of its submodules.
        kernels: Kernel sizes to keep, such as "3x3"; linear layers count as "1x1". None means all.
        kinds: Classes of the layers meant.

    Raises:
        ValueError: If a stage does not exist or holds no such layer, or none has one of the kernel sizes.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
        >>> list(select(nn.ModuleDict({"layer4": net}), ["layer4"], kernels=["1x1"]))
        ['layer4.2']
    """
    chosen: dict[str, nn.Module] = {}
    for stage, modules in in_stages(backbone, stages).items():
        found = {name: module for name, module in modules.items() if isinstance(module, kinds)}
        if not found:
            raise ValueError(f"stages: {stage!r} holds no convolution to train; leave it out")
        chosen |= found
    if kernels is None:
        return chosen
    sizes = {
        name: "x".join(map(str, getattr(layer, "kernel_size", (1, 1)))) for name, layer in chosen.items()
    }
    for kernel in kernels:
        if kernel not in sizes.values():
            raise ValueError(
                f"kernels: no layer of {', '.join(stages)} has a kernel of {kernel}; "
                f"there are {', '.join(sorted(set(sizes.values())))}"
            )
    return {name: layer for name, layer in chosen.items() if sizes[name] in kernels}
