"""The training-free reference: nearest prototype on pretrained features.

Idea: Zhang et al., SG-One, IEEE Trans. Cybernetics 50(9), 2020 (masked average pooling, cosine), and Wang et
al., PANet, ICCV 2019 (a second prototype, of the background). Written from those descriptions; no code was
taken. Where this differs on purpose:

- Nothing is learned, so a plain ImageNet backbone serves, and a GPU is not needed.
- The features of three stages count alike: each is brought to unit length at every position before they are
  put side by side, or the stage with the largest numbers would decide alone.
- All shots share one prototype per side, weighted by area: an object that fills its picture says more.
- Sizes decide how maps are laid over pictures. At odd sizes (the papers' 8n + 1) positions meet the corners;
  at even sizes they are the middles of cells. EfficientNet-Lite0 is made for the latter: its padding is
  lopsided there, its kernels have learned to make up for it, and at odd sizes its features come out half a
  cell to the lower right. Measured on emoji, fold 0, 150 episodes: mIoU 0.285 at 129 pixels and 0.325 at 128;
  0.343 at 257 and 0.360 at 256.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svf_lightning.backbones.backbone import Backbone
from svf_lightning.episode import BACKGROUND, Episode, Prediction
from svf_lightning.models.blocks import foreground, resize


class Prototypes(NamedTuple):
    """What a class and its surroundings look like on average."""

    foreground: Tensor  # (B, C)
    background: Tensor  # (B, C)


class Matcher(nn.Module):
    """Give every query position to the prototype, of the class or of its background, that it is closer to.

    `prototypes` and `match` are the two halves of `forward`, so that the supports of many queries are looked
    at once.

    Args:
        backbone: Five stages; any pretrained one. See above for the size of the images it should get.
        stages: Stages whose features are compared, of 0 to 4, shallow to deep. The first one's resolution is
            that of the comparison.
        temperature: What cosines are multiplied by, to be logits. It changes probabilities, not masks.

    Raises:
        ValueError: If ``stages`` is empty or not of 0 to 4.
    """

    any_shot = True  # whether any number of shots fits

    def __init__(
        self, backbone: Backbone, *, stages: Sequence[int] = (2, 3, 4), temperature: float = 20.0
    ) -> None:
        super().__init__()
        if not stages or not set(stages) <= set(range(5)):
            raise ValueError(f"stages must be some of 0 to 4, got {list(stages)}")
        self.backbone = backbone.requires_grad_(False)
        self.stages, self.temperature = tuple(stages), temperature

    def forward(self, episode: Episode) -> Prediction:
        """Predict the query's mask from any number of supports.

        Returns:
            Logits ``(B, 2, H, W)`` at the query's size; nothing auxiliary.
        """
        return self.match(episode.query_image, self.prototypes(episode.support_images, episode.support_masks))

    def prototypes(self, images: Tensor, masks: Tensor) -> Prototypes:
        """Average the supports' features inside and outside of their masks.

        Args:
            images: Normalised, shape ``(B, K, 3, H, W)``.
            masks: 0, 1 and 255, which counts on neither side; shape ``(B, K, H, W)``.

        Returns:
            Prototypes, ``(B, C)`` each; zero for a side that no support shows.
        """
        batch = len(images)
        features = self.features(images.flatten(0, 1))  # (BK, C, h, w)
        inside = foreground(masks, images)
        sides = torch.stack([inside, (masks == BACKGROUND).to(inside.dtype)], dim=2).flatten(0, 1)
        weights = _lay(sides, features.shape[-2:], images.shape[-1])  # (BK, 2, h, w), soft at the borders
        sums = torch.einsum("nchw,nshw->nsc", features, weights).unflatten(0, (batch, -1)).sum(dim=1)
        areas = weights.sum(dim=(2, 3)).unflatten(0, (batch, -1)).sum(dim=1)  # (B, 2)
        means = sums / areas.clamp_min(1e-6)[..., None]  # (B, 2, C)
        return Prototypes(means[:, 0], means[:, 1])

    def match(self, query: Tensor, prototypes: Prototypes) -> Prediction:
        """Compare queries ``(B, 3, H, W)`` with the prototypes of their episodes."""
        return self.compare(self.features(query), prototypes, query.shape[-2:])

    def compare(self, features: Tensor, prototypes: Prototypes, size: Sequence[int]) -> Prediction:
        """What `match` does, on features ``(B, C, h, w)`` of queries of ``size`` that are there already."""
        sides = torch.stack([prototypes.background, prototypes.foreground], dim=1)  # (B, 2, C)
        cosine = torch.einsum("bchw,bsc->bshw", F.normalize(features), F.normalize(sides, dim=2))
        return Prediction(_lay(self.temperature * cosine, (size[0], size[1]), size[1]))

    def features(self, images: Tensor) -> Tensor:
        """Features of the stages side by side, each of unit length everywhere, shape ``(N, C, h, w)``."""
        stages = self.backbone(images)
        size = stages[self.stages[0]].shape[-2:]
        unit = [_lay(F.normalize(stages[stage]), size, images.shape[-1]) for stage in self.stages]
        return torch.cat(unit, dim=1)


def _lay(x: Tensor, size: Sequence[int], image_width: int) -> Tensor:
    """Maps ``(N, C, H, W)`` at another size; what their positions mean follows from the image's width."""
    if image_width % 2:
        return resize(x, (size[0], size[1]))
    if x.shape[-1] > size[1]:
        return F.interpolate(x, (size[0], size[1]), mode="area")  # loses no object, however small
    return F.interpolate(x, (size[0], size[1]), mode="bilinear", align_corners=False)
