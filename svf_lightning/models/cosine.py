"""A minimal method, to copy: a prototype per episode, and a small head that reads its cosine with the query.

Idea: Zhang et al., SG-One, IEEE Trans. Cybernetics 50(9), 2020. Written from that description; no code was
taken. What the files of a method have to hold: docs/adding_a_method.md.
"""

import torch
from torch import nn
from torch.nn import functional as F

from svf_lightning.backbones.backbone import Backbone
from svf_lightning.episode import Episode, Prediction
from svf_lightning.models.blocks import conv_relu, foreground, masked_average_pool, one_batch, resize


class Cosine(nn.Module):
    """Segment the query by its features, the class's prototype and their cosine similarity.

    Args:
        backbone: Five stages.
        stage: The stage whose features are compared, 0 to 4.
        channels: Width of the head.
    """

    any_shot = True  # whether any number of shots fits

    def __init__(self, backbone: Backbone, *, stage: int = 3, channels: int = 64) -> None:
        super().__init__()
        self.backbone, self.stage = backbone, stage
        width = 2 * backbone.channels[stage] + 1
        self.head = nn.Sequential(*conv_relu(width, channels), nn.Conv2d(channels, 2, 1))

    def forward(self, episode: Episode) -> Prediction:
        """Predict the query's mask from any number of supports: logits ``(B, 2, H, W)``."""
        batch = len(episode.query_image)
        features = self.backbone(one_batch(episode.query_image, episode.support_images))[self.stage]
        query, supports = features[:batch], features[batch:]  # (B, C, h, w), (BK, C, h, w)

        masks = foreground(episode.support_masks.flatten(0, 1), features)[:, None]  # (BK, 1, H, W)
        prototypes = masked_average_pool(supports, resize(masks, supports.shape[-2:])[:, 0])  # (BK, C)
        prototype = prototypes.unflatten(0, (batch, -1)).mean(dim=1)[:, :, None, None].expand_as(query)
        similarity = F.cosine_similarity(query, prototype, dim=1)[:, None]  # (B, 1, h, w)

        logits = self.head(torch.cat([query, prototype, similarity], dim=1))  # (B, 2, h, w)
        return Prediction(resize(logits, episode.query_image.shape[-2:]))
