"""PFENet: a prior mask that needs no training, and a pyramid that enriches the query's features.

Paper: Tian et al., Prior Guided Feature Enrichment Network for Few-Shot Segmentation, TPAMI 2020
(arXiv:2008.01449). Original code: dvlab-research/PFENet; the SVF authors' variant:
zechao-li/SVF-few-shot-segmentation, ``model/pfenet.py``. Written from a description of their behaviour,
nothing is copied; module names are the official ones, so that checkpoints of both carry over.

The two official codes compute the same from the same features. They differ outside of this file:

- Dilation of the ResNet: "uniform" in the original, "torchvision" in the SVF authors'.
- BatchNorm of the backbone: the original forgets to fix it, so that the frozen backbone uses the
  statistics of the batch while training and its running statistics drift; every later work fixes it.
  ``batch_norm="batch"`` brings the original back, queries and each shot as batches of their own.
- Bins: the original's on COCO are fractions of the feature map, ``(1.0, 0.5, 0.25, 0.125)``; the SVF
  authors keep ``(60, 30, 15, 8)`` everywhere.

Unlike the official code, query and supports pass the backbone in one batch, feature maps may have any
aspect ratio, the inner classifiers run in training only, and ``channels`` widens or narrows the head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svf_lightning.backbones.backbone import Backbone, is_batch_norm
from svf_lightning.episode import Episode, Prediction
from svf_lightning.models.blocks import (
    check_options,
    classifier,
    compare,
    conv_relu,
    foreground,
    kaiming_fan_in_,
    one_batch,
    resize,
    two_convolutions,
)


class PFENet(nn.Module):
    """Segment the query by a prior mask and a prototype, brought together at several scales.

    Args:
        backbone: Five stages; features of stages 2 and 3 feed the head, stage 4 the prior.
        shot: Supports per episode in training. Priors and prototypes are averaged over the shots, so
            the head has no part that depends on it, and any number fits at test time.
        bins: Scales of the enrichment, in official order from fine to coarse. Above 1 the side of a
            square map in positions; up to 1 a fraction of the feature map. A bin may be larger than the
            feature map: pooling then repeats positions. Carries no weights and may be set later.
        channels: Width of the head.
        dropout: Share of channels dropped after the two projections while training.
        grid: The stage whose resolution the head works at, "layer3" (official) or "layer2".
        prior_stages: Stages whose features give a prior mask each, of 2, 3 and 4; officially 4 alone.
        batch_norm: "fixed" keeps the backbone's BatchNorm at its pretrained statistics; "batch" is the
            original code's habit in training, at the price of a backbone pass per shot.
        init: "default" is torch's initialisation (official); "kaiming" keeps a signal's size through the
            head, and learns sooner.

    Raises:
        ValueError: If an option has none of its values, or ``shot`` is below 1.

    Source:
        Tian et al., TPAMI 2020, sections 4.2 (prior) and 4.3 (feature enrichment).
    """

    any_shot = True  # whether numbers of shots other than ``shot`` fit

    def __init__(
        self,
        backbone: Backbone,
        shot: int = 1,
        *,
        bins: Sequence[float] = (60, 30, 15, 8),
        channels: int = 256,
        dropout: float = 0.5,
        grid: str = "layer3",
        prior_stages: Sequence[int] = (4,),
        batch_norm: str = "fixed",
        init: str = "default",
    ) -> None:
        super().__init__()
        if not bins or any(b <= 0 or (b > 1 and b != int(b)) for b in bins):
            raise ValueError(
                f"bins must be whole numbers above 1 or fractions above 0, and at least one; got {list(bins)}"
            )
        check_options(grid, prior_stages, init, shot)
        if batch_norm not in ("fixed", "batch"):
            raise ValueError(f"batch_norm must be 'fixed' or 'batch', got {batch_norm!r}")
        self.backbone = backbone
        self.shot = shot
        self.bins = tuple(bins)
        self.grid = grid
        self.prior_stages = tuple(prior_stages)
        self.batch_norm = batch_norm

        scales = range(len(self.bins))
        middle = backbone.channels[3] + backbone.channels[2]
        merged = 2 * channels + len(self.prior_stages)
        self.down_query = nn.Sequential(*conv_relu(middle, channels), nn.Dropout2d(dropout))
        self.down_supp = nn.Sequential(*conv_relu(middle, channels), nn.Dropout2d(dropout))
        self.init_merge = nn.ModuleList(nn.Sequential(*conv_relu(merged, channels)) for _ in scales)
        self.alpha_conv = nn.ModuleList(nn.Sequential(*conv_relu(2 * channels, channels)) for _ in scales[1:])
        self.beta_conv = nn.ModuleList(two_convolutions(channels) for _ in scales)
        self.inner_cls = nn.ModuleList(classifier(channels) for _ in scales)
        self.res1 = nn.Sequential(*conv_relu(len(self.bins) * channels, channels))
        self.res2 = two_convolutions(channels)
        self.cls = classifier(channels)
        if init == "kaiming":
            kaiming_fan_in_(*(module for name, module in self.named_children() if name != "backbone"))
            for head in (*self.inner_cls, self.cls):
                nn.init.normal_(head.get_parameter("3.weight"), std=0.01)  # begins undecided

    def train(self, mode: bool = True) -> "PFENet":
        """Set training mode; the backbone's BatchNorm follows only with ``batch_norm="batch"``."""
        super().train(mode)
        if self.batch_norm == "batch":
            for module in self.backbone.modules():
                if is_batch_norm(module):
                    module.train(mode)
        return self

    def forward(self, episode: Episode) -> Prediction:
        """Predict the query's mask.

        Args:
            episode: With any number of supports each.

        Returns:
            Logits ``(B, 2, H, W)`` at the query's size. In training also those of the inner classifiers
            as ``inner_0``, ``inner_1``, ..., at the same size.
        """
        masks = foreground(episode.support_masks, episode.query_image)  # (B, K, H, W)

        # Section 4.2: one prototype and one prior mask per support, averaged over the shots.
        query, prototypes, priors = compare(
            self._features(episode, masks),
            masks.flatten(0, 1),
            self.down_query,
            self.down_supp,
            self.grid,
            self.prior_stages,
        )  # (B, C, h, w), (B, K, C), (B, K, stages, h, w)
        enriched, inner = self._enrich(query, prototypes.mean(dim=1)[:, :, None, None], priors.mean(dim=1))

        x = self.res1(torch.cat(enriched, dim=1))
        x = self.res2(x) + x
        size = episode.query_image.shape[-2:]
        auxiliary = {f"inner_{index}": resize(logits, size) for index, logits in enumerate(inner)}
        return Prediction(resize(self.cls(x), size), auxiliary)

    def _features(self, episode: Episode, masks: Tensor) -> list[Tensor]:
        """Features of stages 2, 3 and 4, of B queries and then BK supports, these masked before stage 4."""
        query, supports = episode.query_image, episode.support_images
        see_all = torch.ones_like(masks[:, 0])
        if not (self.training and self.batch_norm == "batch"):
            images = one_batch(query, supports)
            return self.backbone(images, torch.cat([see_all, masks.flatten(0, 1)]))[2:]
        # Each pass has its own batch statistics: one for the queries, one per shot.
        of_query = self.backbone(query, see_all)[2:]
        of_shots = [self.backbone(supports[:, k], masks[:, k])[2:] for k in range(masks.shape[1])]
        return [
            torch.cat([first, torch.stack(shots, dim=1).flatten(0, 1)])
            for first, *shots in zip(of_query, *of_shots, strict=True)
        ]

    def _enrich(self, query: Tensor, prototype: Tensor, prior: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Section 4.3: merge at every scale, each informed by the finer one before it.

        Args:
            query: Shape ``(B, C, h, w)``.
            prototype: Shape ``(B, C, 1, 1)``.
            prior: Shape ``(B, stages, h, w)``.

        Returns:
            Enriched features ``(B, C, h, w)`` of every scale, and in training the inner logits
            ``(B, 2, bin, bin)``.
        """
        size = query.shape[-2:]
        enriched: list[Tensor] = []
        inner: list[Tensor] = []
        for index, scale in enumerate(self.bins):
            height, width = (int(scale) if scale > 1 else max(1, int(n * scale)) for n in size)
            pooled = F.adaptive_avg_pool2d(query, (height, width))
            scaled_prior = resize(prior, pooled.shape[-2:])
            x = self.init_merge[index](torch.cat([pooled, prototype.expand_as(pooled), scaled_prior], dim=1))
            if enriched:  # inter-scale interaction, from the finer scale to this one
                before = resize(enriched[-1], pooled.shape[-2:])
                x = self.alpha_conv[index - 1](torch.cat([x, before], dim=1)) + x
            x = self.beta_conv[index](x) + x
            if self.training:
                inner.append(self.inner_cls[index](x))
            enriched.append(resize(x, size))
        return enriched, inner
