"""The paper's baseline: prototype, prior mask and an ASPP head. BAM's meta learner alone.

Paper: Sun et al., Singular Value Fine-tuning: Few-shot Segmentation requires Few-parameters
Fine-tuning, NeurIPS 2022 (arXiv:2206.06122). Meta learner: Lang et al., BAM, CVPR 2022.
Original code: zechao-li/SVF-few-shot-segmentation, ``model/aspp.py`` (MIT licence of its parent
chunbolang/BAM); rewritten here from its behaviour. Module names are the official ones, so
that checkpoints carry over.

Where the official code departs from the paper, its way is the default, because it made the
published numbers, and an argument gives the other:

- ``train_down_query=False``: the official optimizer has no group for ``down_query``, which thus
  stays a fixed random projection of the query features. Here it is frozen openly.
- ``shot_reduction="sum"``: priors and prototypes of K supports are added, not averaged, so a
  head trained for one K fits no other. "mean" carries over from any K to any other.
- ``kshot_rw`` of the official state dict is never used there and does not exist here; nor does
  the Gram matrix, which is computed and thrown away.

Unlike the official code, query and supports pass the backbone in one batch, feature maps may have
any aspect ratio, and ``channels`` widens or narrows the head (256 in the paper).
"""

from collections.abc import Sequence

import torch
from torch import nn

from svf_lightning.backbones.backbone import Backbone
from svf_lightning.episode import Episode, Prediction
from svf_lightning.models.blocks import check_options, compare, foreground, meta_learner, one_batch, resize


class Baseline(nn.Module):
    """Segment the query by its similarity to one prototype and one prior mask of the supports.

    Args:
        backbone: Five stages; features of stages 2 and 3 feed the head, stage 4 the prior.
        shot: Supports per episode that the head is trained for. Only ``shot_reduction="mean"``
            accepts another number at test time.
        channels: Width of the head.
        shot_reduction: How priors and prototypes of the shots combine, "sum" (official) or "mean".
        train_down_query: Whether the projection of the query features learns (officially not).
        dropout: Share of channels dropped after the two projections while training.
        prior_stages: Stages whose features give a prior mask each, of 2, 3 and 4. Officially stage 4
            alone; where that is a poor matcher, as in EfficientNet-Lite0, all three do far better.
        grid: The stage whose resolution the head works at. A dilated ResNet has one resolution from
            stage 2 on; elsewhere "layer3" is the official choice, and "layer2" sees finer.
        init: "default" is torch's initialisation (official), under which a signal shrinks two- to
            threefold per convolution of this deep head; "kaiming" keeps its size, and learns sooner.

    Raises:
        ValueError: If an option has none of its values, or ``shot`` is below 1.

    Source:
        Sun et al., NeurIPS 2022, section 4.1 and supplement.
    """

    def __init__(
        self,
        backbone: Backbone,
        shot: int = 1,
        *,
        channels: int = 256,
        shot_reduction: str = "sum",
        train_down_query: bool = False,
        dropout: float = 0.5,
        grid: str = "layer3",
        prior_stages: Sequence[int] = (4,),
        init: str = "default",
    ) -> None:
        super().__init__()
        if shot_reduction not in ("sum", "mean"):
            raise ValueError(f"shot_reduction must be 'sum' or 'mean', got {shot_reduction!r}")
        check_options(grid, prior_stages, init, shot)
        self.backbone = backbone
        self.shot = shot
        self.shot_reduction = shot_reduction
        self.any_shot = shot_reduction == "mean"  # whether numbers of shots other than ``shot`` fit
        self.grid = grid
        self.prior_stages = tuple(prior_stages)

        middle = backbone.channels[3] + backbone.channels[2]
        (
            self.down_query,
            self.down_supp,
            self.init_merge,
            self.ASPP_meta,
            self.res1_meta,
            self.res2_meta,
            self.cls_meta,
        ) = meta_learner(middle, channels, len(prior_stages), dropout, init)
        self.down_query.requires_grad_(train_down_query)

    def forward(self, episode: Episode) -> Prediction:
        """Predict the query's mask.

        Args:
            episode: With ``shot`` supports each (any number with ``shot_reduction="mean"``).

        Returns:
            Logits ``(B, 2, H, W)`` at the query's size; nothing auxiliary.

        Raises:
            ValueError: If the episode's shots are not those that a summing head was trained for.
        """
        shots = episode.support_images.shape[1]
        if shots != self.shot and not self.any_shot:
            raise ValueError(
                f"this head sums over {self.shot} shot(s) and got {shots}; train it with shot={shots}, "
                "or with model.network.shot_reduction=mean, which fits any number of shots"
            )
        batch = len(episode.query_image)
        masks = foreground(episode.support_masks.flatten(0, 1), episode.query_image)  # (BK, H, W)

        # Features of stages 2 and 3, and of stage 4 with the supports' background masked out.
        images = one_batch(episode.query_image, episode.support_images)
        see_all = masks.new_ones(batch, *masks.shape[1:])
        features = self.backbone(images, layer4_mask=torch.cat([see_all, masks]))[2:]
        query, prototypes, priors = compare(
            features, masks, self.down_query, self.down_supp, self.grid, self.prior_stages
        )  # (B, C, h, w), (B, K, C), (B, K, stages, h, w)

        reduce = torch.sum if self.shot_reduction == "sum" else torch.mean
        prototype = reduce(prototypes, dim=1)[:, :, None, None].expand_as(query)
        x = self.init_merge(torch.cat([query, prototype, reduce(priors, dim=1)], dim=1))

        x = self.res1_meta(self.ASPP_meta(x))
        x = self.res2_meta(x) + x
        return Prediction(resize(self.cls_meta(x), episode.query_image.shape[-2:]))
