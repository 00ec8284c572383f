"""Load official checkpoints into the models of this package."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svf_lightning.backbones import resnet, vgg
from svf_lightning.backbones.backbone import Backbone
from svf_lightning.backbones.resnet import Dilation, resnet50, resnet101
from svf_lightning.backbones.vgg import vgg16
from svf_lightning.backbones.weights import load_exactly
from svf_lightning.models.bam import BAM
from svf_lightning.models.baseline import Baseline
from svf_lightning.models.cyctr import CyCTR
from svf_lightning.models.hsnet import HSNet
from svf_lightning.models.pfenet import PFENet
from svf_lightning.models.pspnet import PSPNet
from svf_lightning.svf.layer import from_factors

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
            "pfenet": dvlab-research/PFENet. "svf_pfenet": ``model/pfenet.py`` of the SVF authors, with the
            same keys as the original but another dilation. "hsnet": juhongm999/hsnet. "cyctr":
            YanFangCS/CyCTR-Pytorch, with its way of sampling tokens; ``addtional_proj`` is dropped.
            "bam": chunbolang/BAM. "svf_bam": ``model/BAM.py`` of the SVF authors, with a second backbone for
            the base learner. Class ids are not in their files: base classes count from 1. "bam_base": the
            PSPNet of BAM's first stage, all of it trainable.
        state_dict: A whole checkpoint, or its ``state_dict`` entry; a ``module.`` prefix is removed.
            Plain, or with SVF factors (``conv_V.weight``, ``vector_S``, ``conv_U.weight``) of whatever
            rank: the official code cuts the stem's 27 to 24.
        backbone: "resnet50", "resnet101" or "vgg16".
        shot: Supports per episode that the checkpoint was trained for.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: For an unknown method or backbone, for a checkpoint of another method or trained for
            another number of shots that matters, or at the first key that is missing, left over or of
            another shape. "pfenet" and "svf_pfenet" without SVF factors cannot be told apart.

    Example:
        >>> from_official("unet", {})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: method must be one of ...; got 'unet'
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}; got {method!r}")
    content: Any = state_dict.get("state_dict", state_dict)
    state = {key.removeprefix("module."): value for key, value in content.items()}
    try:
        return _METHODS[method](state, backbone, shot).eval()
    except ValueError as error:
        methods = next((methods for key, methods in _SIGNS.items() if key in state), (method,))
        if method not in methods:
            raise ValueError(f"{error}; import it as method {' or '.join(map(repr, methods))}") from None
        if _backbone_of(state) not in (None, backbone):
            raise ValueError(f"{error}; import it with backbone={_backbone_of(state)!r}") from None
        raise


def _baseline(state: State, backbone: str, shot: int) -> nn.Module:
    # down_query has a gradient in the official code too, though its optimizer never sees it.
    model = Baseline(_backbone(backbone, "torchvision"), shot, train_down_query=True)
    _check_shot(state, shot, "whose sums over the shots fit no other number")
    # Made and saved for more than one shot, but never used there.
    state = {key: value for key, value in state.items() if not key.startswith("kshot_rw.")}
    return _fill(model, state, "the checkpoint")


def _pfenet(state: State, backbone: str, shot: int) -> nn.Module:
    factors = next((key for key in state if key.endswith(".vector_S")), None)
    if factors is not None:
        raise ValueError(
            f"the checkpoint has SVF factors such as {factors!r}, which dvlab-research/PFENet never had; "
            "import it as method 'svf_pfenet'"
        )
    return _fill(PFENet(_backbone(backbone, "uniform"), shot), state, "the checkpoint")


def _svf_pfenet(state: State, backbone: str, shot: int) -> nn.Module:
    return _fill(PFENet(_backbone(backbone, "torchvision"), shot), state, "the checkpoint")


def _hsnet(state: State, backbone: str, shot: int) -> nn.Module:
    """Plain torchvision backbones under ``backbone.``, classifiers included; the learner beside them."""
    build = {
        "resnet50": lambda: resnet50(stem="plain", dilation="none"),
        "resnet101": lambda: resnet101(stem="plain", dilation="none"),
        "vgg16": lambda: vgg16(batch_norm=False, ceil_mode=False),
    }
    if backbone not in build:
        raise ValueError(f"backbone must be {', '.join(build)}, got {backbone!r}")
    inside = "backbone."
    pretrained = {key.removeprefix(inside): value for key, value in state.items() if key.startswith(inside)}
    staged = vgg.in_stages(pretrained) if backbone == "vgg16" else resnet.in_stages(pretrained, "plain")
    head = {key: value for key, value in state.items() if not key.startswith(inside)}
    return _fill(HSNet(build[backbone](), shot), {**staged, **head}, "the checkpoint")


def _cyctr(state: State, backbone: str, shot: int) -> nn.Module:
    """A backbone under ``backbone.body.`` whose BatchNorms are constants, so they never counted batches."""
    if backbone not in ("resnet50", "resnet101"):
        raise ValueError(f"backbone must be resnet50 or resnet101 for CyCTR, got {backbone!r}")
    inside = "backbone.body."
    pretrained = {key.removeprefix(inside): value for key, value in state.items() if key.startswith(inside)}
    unused = (inside, "addtional_proj.")
    head = {key: value for key, value in state.items() if not key.startswith(unused)}
    network = _backbone(backbone, "torchvision")
    counts = {k: v for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")}
    model = CyCTR(network, shot, sampling="official")
    return _fill(model, {**counts, **resnet.in_stages(pretrained, "deep"), **head}, "the checkpoint")


def _bam(state: State, backbone: str, shot: int) -> nn.Module:
    """Both BAM codes. Base class ids are not in the file: they count from 1 here."""
    if "learner_base.1.4.bias" not in state:
        raise ValueError("the checkpoint has no 'learner_base.1.4.bias'; it is no checkpoint of BAM")
    _check_shot(state, shot, "whose learned weights fit no other number")
    if "kshot_rw.weight" in state:
        raise ValueError(
            "the checkpoint weighs its shots by one layer, 'kshot_rw.weight' (kshot_trans_dim=0 there); "
            "only the two layers of the default, kshot_trans_dim=2, can be imported"
        )
    state, separate = _name_base_backbone(state)
    classes = len(state["learner_base.1.4.bias"]) - 1
    pspnet = PSPNet(_backbone(backbone, "uniform"), classes)
    model = BAM(
        pspnet.backbone,
        shot,
        base_learner=nn.Sequential(pspnet.ppm, pspnet.cls),
        base_classes=range(1, classes + 1),
        own_stages=[f"layer{i}" for i in range(5)] if separate else (),
    )
    return _fill(model, state, "the checkpoint")


def _backbone_of(state: State) -> str | None:
    """Which backbone a checkpoint has, as far as its names show it."""
    names = "\n".join(state)
    if "layer3.5.conv1." in names:
        return "resnet101" if "layer3.22.conv1." in names else "resnet50"
    return "vgg16" if "layer4.6." in names or "features.28." in names else None


def _check_shot(state: State, shot: int, why: str) -> None:
    """Refuse a number of shots that the checkpoint was not trained for."""
    last = next((key for key in ("kshot_rw.2.bias", "kshot_rw.weight") if key in state), None)
    trained = 1 if last is None else len(state[last])
    if trained != shot:
        raise ValueError(
            f"the checkpoint was trained for {trained} shot(s), {why}, but shot={shot}; "
            f"import it with shot={trained}"
        )


def _name_base_backbone(state: State) -> tuple[State, bool]:
    """Find the SVF authors' second backbone, ``layer0p`` .. ``layer4p``: the first one before SVF changed it.

    Without SVF it is the first one under other names, and is dropped. Also says whether it is another.
    """
    twins = {
        re.sub(r"^(layer[0-4])p\.", r"\1.", key): key for key in state if re.match(r"layer[0-4]p\.", key)
    }
    rest = {key: value for key, value in state.items() if key not in twins.values()}
    stages = {key for key in state if re.match(r"layer[0-4]\.", key)}
    if not twins or (
        twins.keys() == stages and all(torch.equal(state[one], state[other]) for one, other in twins.items())
    ):
        return rest, False
    return rest | {f"base_backbone.{one}": state[other] for one, other in twins.items()}, True


def _bam_base(state: State, backbone: str, shot: int) -> nn.Module:
    """BAM's first stage, in whose files the backbone stands twice: as ``layer0`` and as ``encoder.0``."""
    if "cls.4.bias" not in state:
        raise ValueError("the checkpoint has no 'cls.4.bias'; it is no base learner of BAM")
    state = {key: value for key, value in state.items() if not key.startswith("encoder.")}
    model = PSPNet(_backbone(backbone, "uniform"), len(state["cls.4.bias"]) - 1)
    return _fill(model, state, "the checkpoint").requires_grad_(True)


# What only the checkpoints of these methods have; the first that fits decides.
_SIGNS = {
    "hpn_learner.decoder2.2.bias": ("hsnet",),
    "transformer.level_embed": ("cyctr",),
    "alpha_conv.0.0.weight": ("pfenet", "svf_pfenet"),
    "learner_base.1.4.bias": ("bam", "svf_bam"),
    "ppm.features.0.1.weight": ("bam_base",),
    "ASPP_meta.layer6_0.0.weight": ("baseline",),
}

_METHODS = {
    "baseline": _baseline,
    "cyctr": _cyctr,
    "pfenet": _pfenet,
    "svf_pfenet": _svf_pfenet,
    "hsnet": _hsnet,
    "bam": _bam,
    "svf_bam": _bam,
    "bam_base": _bam_base,
}


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
            layer = from_factors(plain, u, s, vh)
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
