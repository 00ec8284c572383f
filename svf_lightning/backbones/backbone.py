"""The interface of all backbones: five stages, ``layer0`` to ``layer4``, and a list of their features."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """Five stages run one after the other; every stage's output is a feature.

    BatchNorm modules stay in eval mode whatever ``train`` is told: their statistics belong to the
    pretraining, and a batch of a few episodes would only spoil them. What is trainable is not
    decided here but by the strategies in ``finetune/``.

    A stage maps ``(N, C, h, w)`` to ``(N, C', h', w')``. It may return a tuple instead, whose first
    item is that map and whose rest only the next stage understands (a ViT's class token).

    Args:
        stages: The modules ``layer0`` .. ``layer4``.
        channels: Channels of each stage's output.
        strides: Image pixels per output position of each stage.
        mean: What images in ``[0, 1]`` are normalised with, one number per RGB channel.
        std: Likewise.
        scale: What each returned feature is divided by, to bring large linear outputs to unit
            scale. The next stage still gets the unscaled output.

    Raises:
        ValueError: If there are not five stages, channels, strides and scales.

    Source:
        The stage names, the mask before ``layer4`` and the fixed BatchNorm are those of PFENet
        (Tian et al., TPAMI 2020), BAM (Lang et al., CVPR 2022) and SVF (Sun et al., NeurIPS 2022).
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        channels: Sequence[int],
        strides: Sequence[int],
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        scale: Sequence[float] = (1.0,) * 5,
    ) -> None:
        super().__init__()
        per_stage = {"stages": stages, "channels": channels, "strides": strides, "scale": scale}
        for name, values in per_stage.items():
            if len(values) != 5:
                raise ValueError(f"a backbone has five stages, but {name} has {len(values)} items; give five")
        self.layer0, self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.channels, self.strides = tuple(channels), tuple(strides)
        self.mean, self.std = tuple(mean), tuple(std)
        self.scale = tuple(float(s) for s in scale)
        self.train(self.training)

    def forward(self, images: Tensor, layer4_mask: Tensor | None = None) -> list[Tensor]:
        """Compute the features of all five stages, shallow to deep.

        Args:
            images: Normalised images, shape ``(N, 3, H, W)``.
            layer4_mask: Weights in ``[0, 1]``, shape ``(N, H, W)``, or None for all ones. Resized
                to the output of ``layer3``, they multiply the input of ``layer4`` and nothing else.
                Give the supports their masks and the queries ones, and both go through in one batch.

        Returns:
            Five features, shapes ``(N, channels[i], ~H / strides[i], ~W / strides[i])``.

        Raises:
            ValueError: If mask and images differ in number.
        """
        if layer4_mask is not None and (layer4_mask.ndim != 3 or len(layer4_mask) != len(images)):
            raise ValueError(
                f"layer4_mask is {tuple(layer4_mask.shape)} but images are {tuple(images.shape)}; "
                "give one (H, W) mask per image"
            )
        features = []
        state: Tensor | tuple[Tensor, ...] = images
        for index, stage in enumerate((self.layer0, self.layer1, self.layer2, self.layer3, self.layer4)):
            if index == 4 and layer4_mask is not None:
                state = _weigh(state, layer4_mask)
            state = stage(state)
            feature = state if isinstance(state, Tensor) else state[0]
            features.append(feature if self.scale[index] == 1 else feature / self.scale[index])
        return features

    def train(self, mode: bool = True) -> "Backbone":
        """Set training mode for everything but BatchNorm, which stays in eval mode."""
        super().train(mode)
        for module in self.modules():
            if is_batch_norm(module):
                module.eval()
        return self


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is BatchNorm, by its name: SyncBatchNorm and timm's BatchNormAct2d are, too."""
    return "BatchNorm" in type(module).__name__


def _weigh(state: Tensor | tuple[Tensor, ...], mask: Tensor) -> Tensor | tuple[Tensor, ...]:
    """Multiply the map in a stage's output ``(N, C, h, w)`` by a mask ``(N, H, W)`` resized to it."""
    if isinstance(state, tuple):
        weighed = _weigh(state[0], mask)
        assert isinstance(weighed, Tensor)
        return weighed, *state[1:]
    mask = mask[:, None].to(torch.promote_types(mask.dtype, torch.float32))
    mask = F.interpolate(mask, state.shape[-2:], mode="bilinear", align_corners=True)
    return state * mask.to(state.dtype)  # in the map's own type: float32 would undo autocast


@torch.no_grad()
def kaiming_fan_out_(module: nn.Module) -> None:
    """Start convolutions as ResNet and VGG do: gradients keep their size on the way back; biases at zero."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)


def dilations(backbone: nn.Module) -> str:
    """Dilations of each stage's convolutions larger than 1x1: what weights alone do not tell.

    Example:
        >>> dilations(nn.ModuleDict({"layer3": nn.Conv2d(1, 1, 3, dilation=2), "layer4": nn.Conv2d(1, 1, 1)}))
        'layer3: 2; layer4: none'
    """
    found = []
    for name, stage in backbone.named_children():
        layers = [m for m in stage.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
        used = sorted({m.dilation[0] for m in layers})
        found.append(f"{name}: {', '.join(map(str, used)) or 'none'}")
    return "; ".join(found)
