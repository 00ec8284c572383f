"""PSPNet on base classes: the first stage of BAM, whose backbone and head BAM takes over.

Paper: Zhao et al., Pyramid Scene Parsing Network, CVPR 2017 (arXiv:1612.01105); as a base learner:
Lang et al., BAM, CVPR 2022 (arXiv:2203.07615), section "Base Learner". Original code: ``model/PSPNet.py``
of chunbolang/BAM (MIT); rewritten here from its behaviour. Module names are the official ones.

As there, the auxiliary classifier of the PSPNet paper is left out. Unlike there, the backbone is one module
instead of being registered twice (``layer0`` and ``encoder.0``).
"""

import torch
from torch import Tensor, nn

from svf_lightning.backbones.backbone import Backbone, is_batch_norm
from svf_lightning.models.blocks import resize

BINS = (1, 2, 3, 6)


class PyramidPooling(nn.Module):
    """Put beside every position the averages of its image, over the whole and over 2, 3 and 6 parts a side.

    Args:
        channels: Of the input; the output has twice as many.

    Source:
        Zhao et al., CVPR 2017, section 3.2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = channels // len(BINS)
        self.features = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(size),
                nn.Conv2d(channels, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            )
            for size in BINS
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, h, w)`` to ``(N, 2C, h, w)``."""
        return torch.cat([x, *(resize(pool(x), x.shape[-2:]) for pool in self.features)], dim=1)


class PSPNet(nn.Module):
    """Tell the base classes and background apart, pixel by pixel.

    ``ppm`` followed by ``cls`` maps features of the backbone's last stage ``(N, C, h, w)`` to logits; this is
    the base learner that BAM takes over.

    Args:
        backbone: Five stages; the last one's features are read.
        classes: Number of base classes, without background.
        train_batch_norm: Whether the backbone's BatchNorm learns statistics while training, as officially.

    Raises:
        ValueError: If there is no class, or the backbone's last stage has fewer than four channels.
    """

    def __init__(self, backbone: Backbone, classes: int, *, train_batch_norm: bool = True) -> None:
        super().__init__()
        channels = backbone.channels[4]
        if classes < 1 or channels < len(BINS):
            raise ValueError(f"PSPNet needs a class and {len(BINS)} channels, got {classes} and {channels}")
        self.backbone = backbone
        self.classes = classes
        self.train_batch_norm = train_batch_norm
        self.ppm = PyramidPooling(channels)
        self.cls = nn.Sequential(
            nn.Conv2d(channels + len(BINS) * (channels // len(BINS)), 512, 3, padding=1, bias=False),
            nn.BatchNorm2d(512),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.1),
            nn.Conv2d(512, classes + 1, 1),
        )
        self.train(self.training)  # Lightning leaves modes as it finds them

    def train(self, mode: bool = True) -> "PSPNet":
        """Set training mode, also for the backbone's BatchNorm, which never leaves eval mode by itself."""
        super().train(mode)
        if self.train_batch_norm:
            for module in self.backbone.modules():
                if is_batch_norm(module):
                    module.train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, 3, H, W)`` to logits ``(N, classes + 1, H, W)``, background first."""
        *_, f4 = self.backbone(images)
        return resize(self.cls(self.ppm(f4)), images.shape[-2:])
