"""Official checkpoints in, our models out."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from svf_lightning.backbones.backbone import Backbone
from svf_lightning.backbones.resnet import Dilation, resnet50, resnet101
from svf_lightning.backbones.vgg import vgg16
from svf_lightning.backbones.weights import load_exactly
from svf_lightning.finetune import svf
from svf_lightning.models.baseline import Baseline

State = dict[str, Tensor]


def from_official(
    method: str, state_dict: Mapping[str, Tensor], *, backbone: str = "resnet50", shot: int = 1
) -> nn.Module:
    """Build our model with the weights of an official checkpoint.

    Dilation scheme and options are those of the official code, since a checkpoint of the other scheme
    would load without a sign and give wrong features. What requires a gradient is what does so there:
    the head, and the singular values of stages 2 to 4 where the checkpoint has them.

    Args:
        method: "baseline": ``model/aspp.py`` of zechao-li/SVF-few-shot-segmentation.
        state_dict: A whole checkpoint, or its ``state_dict`` entry; a ``module.`` prefix is removed.
            Plain, or with SVF factors (``conv_V.weight``, ``vector_S``, ``conv_U.weight``) of whatever
            rank: the official code cuts the stem's 27 to 24.
        backbone: "resnet50", "resnet101" or "vgg16".
        shot: Supports per episode that the checkpoint was trained for.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: For an unknown method or backbone, or at the first key that is missing, left over or
            of another shape.

    Example:
        >>> from_official("unet", {})
        Traceback (most recent call last):
        ValueError: method must be one of baseline; got 'unet'
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}; got {method!r}")
    content: Any = state_dict.get("state_dict", state_dict)
    state = {key.removeprefix("module."): value for key, value in content.items()}
    return _METHODS[method](state, backbone, shot).eval()


def _baseline(state: State, backbone: str, shot: int) -> nn.Module:
    # down_query has a gradient in the official code too, though its optimizer never sees it.
    model = Baseline(_backbone(backbone, "torchvision"), shot, train_down_query=True)
    if shot > 1:  # made and saved, but never used there
        state = {key: value for key, value in state.items() if not key.startswith("kshot_rw.")}
    return _fill(model, state, "the checkpoint")


_METHODS = {"baseline": _baseline}


def _backbone(name: str, dilation: Dilation) -> Backbone:
    """The official backbones: a deep stem for ResNets, BatchNorm in VGG."""
    if name == "resnet50":
        return resnet50(dilation=dilation)
    if name == "resnet101":
        return resnet101(dilation=dilation)
    if name == "vgg16":
        return vgg16(batch_norm=True)
    raise ValueError(f"backbone must be resnet50, resnet101 or vgg16, got {name!r}")


def _fill(model: nn.Module, state: State, source: str) -> nn.Module:
    """Load a state dict in which the backbone's stages stand beside the head, exactly."""
    backbone = model.get_submodule("backbone")
    backbone.requires_grad_(False)
    state = _take_factors(backbone, state)
    is_stage = tuple(f"{name}." for name, _ in backbone.named_children())
    ours = {f"backbone.{key}" if key.startswith(is_stage) else key: value for key, value in state.items()}
    load_exactly(model, ours, source)
    return model


def _take_factors(backbone: nn.Module, state: State) -> State:
    """Factor the layers whose factors ``state`` holds; return the state in the names of ours."""
    state = dict(state)
    for key in [key for key in state if key.endswith(".vector_S")]:
        name = key.removesuffix(".vector_S")
        try:
            plain = backbone.get_submodule(name)
            u, s, vh = (
                state.pop(f"{name}.{part}") for part in ("conv_U.weight", "vector_S", "conv_V.weight")
            )
            layer = svf.from_factors(plain, u, s, vh)
        except (AttributeError, KeyError, ValueError) as error:
            raise ValueError(
                f"the checkpoint's factors of {name!r} fit no layer of this backbone: {error}"
            ) from None
        layer.requires_grad_(False)
        layer.s.requires_grad_(name.split(".")[0] in ("layer2", "layer3", "layer4"))
        backbone.set_submodule(name, layer)
        state |= {f"{name}.u": layer.u, f"{name}.s": layer.s.detach(), f"{name}.vh": layer.vh}
        if f"{name}.conv_U.bias" in state:
            state[f"{name}.bias"] = state.pop(f"{name}.conv_U.bias")
    return state
