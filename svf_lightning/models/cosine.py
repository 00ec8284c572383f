"""The smallest method that learns: cosine similarity with the prototype. A template for your own.

The prototype is the average feature under the supports' masks, as in SG-One (Zhang et al., IEEE Trans.
Cybernetics 50(9), 2020); scale and threshold are learned. Copy this file and conf/model/cosine.yaml.
"""

import torch
from torch import nn
from torch.nn import functional as F

from svf_lightning.backbones.backbone import Backbone
from svf_lightning.episode import Episode, Prediction
from svf_lightning.models.blocks import foreground, masked_average_pool, resize


class Cosine(nn.Module):
    """Call a query position foreground where its feature points the way of the supports' prototype.

    Args:
        backbone: Five stages.
        stage: The one whose features are compared, 0 to 4.
    """

    any_shot = True  # takes another number of shots than it was trained with

    def __init__(self, backbone: Backbone, *, stage: int = 3) -> None:
        super().__init__()
        self.backbone, self.stage = backbone, stage
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.threshold = nn.Parameter(torch.tensor(0.5))

    def forward(self, episode: Episode) -> Prediction:
        """Logits ``(B, 2, H, W)`` at the query's size, from any number of supports."""
        query = self.backbone(episode.query_image)[self.stage]  # (B, C, h, w)
        supports = self.backbone(episode.support_images.flatten(0, 1))[self.stage]  # (BK, C, h, w)
        masks = foreground(episode.support_masks.flatten(0, 1), supports)  # (BK, H, W), 0 or 1
        masks = resize(masks[:, None], supports.shape[-2:])[:, 0]  # (BK, h, w)
        prototypes = masked_average_pool(supports, masks)  # (BK, C)
        prototype = prototypes.unflatten(0, (len(query), -1)).mean(dim=1)  # (B, C)
        similarity = F.cosine_similarity(query, prototype[:, :, None, None], dim=1)  # (B, h, w)
        margin = self.scale * (similarity - self.threshold)
        logits = torch.stack([torch.zeros_like(margin), margin], dim=1)
        return Prediction(resize(logits, episode.query_image.shape[-2:]))
