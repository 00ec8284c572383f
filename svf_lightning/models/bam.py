"""BAM: a base learner says what is *not* to be segmented, a meta learner what is, and both are merged.

Paper: Lang et al., Learning What Not to Segment: A New Perspective on Few-Shot Segmentation, CVPR 2022
(arXiv:2203.07615). Original code: chunbolang/BAM (MIT); the SVF authors' variant:
zechao-li/SVF-few-shot-segmentation, ``model/BAM.py``. Rewritten here from their behaviour; module names are
the official ones, so that checkpoints of both carry over.

What reads differently from the paper, or from the official code:

- The merged map is a pair of probabilities, yet the loss takes it for logits, as in the official code. Its
  gradient is mild for that; the meta learner learns mainly by its own, auxiliary, cross-entropy.
- The official loss has a third term, the cross-entropy of the base learner. Nothing that leads to it trains
  (base learner and its features are frozen), so it only shifts the number that is printed. It is left out;
  :meth:`BAM.outputs` has the base logits for whoever wants it.
- In training the episode's own class is left out of the base map, or the two learners would contradict each
  other; in evaluation all base classes are summed. The official ``cls_type='Base'``. A class that is no base
  class leaves nothing out (``cls_type='Novel'``).
- The base learner's dropout stays active in training, as in the official code; its BatchNorm does not.
- ``kshot_trans_dim=0`` of the official configuration (one K x K layer) is not offered; nothing uses it.
- Query and supports pass the backbone in one batch, and feature maps may have any aspect ratio.

The base learner was trained on the features of the backbone as it came. Where fine-tuning changes stages of
it, the base learner needs them as they were: ``own_stages`` names those, and the base branch then has frozen
copies of them (``layer0p`` .. ``layer4p`` of the SVF authors). Every other stage is one module with two
names.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from svf_lightning.backbones.backbone import Backbone, is_batch_norm
from svf_lightning.episode import Episode, Prediction
from svf_lightning.models.blocks import check_options, compare, foreground, meta_learner, one_batch, resize


class Outputs(NamedTuple):
    """What the two learners and their ensemble say, at the resolution of the head."""

    ensemble: Tensor  # (B, 2, h, w) background and foreground; each in about [0, 1]
    meta: Tensor  # (B, 2, h, w) logits
    base: Tensor  # (B, base classes + 1, h, w) logits, background first


class BAM(nn.Module):
    """Segment the query where the meta learner sees the class and the base learner sees no base class.

    Args:
        backbone: Five stages; features of stages 2 and 3 feed the meta learner, stage 4 the prior and the
            base learner, stage 2 the comparison of query and support as a whole.
        shot: Supports per episode; with more than one, their learned weights fit no other number.
        base_learner: Maps features of stage 4 ``(B, C, h, w)`` to logits ``(B, base classes + 1, h, w)``,
            background first. Frozen here. ``nn.Sequential(pspnet.ppm, pspnet.cls)``.
        base_classes: The data set's ids of the base learner's classes, in its order.
        own_stages: Stages that fine-tuning will change, such as "layer3" or "layer3.0.conv1": the base
            learner keeps frozen copies of these, made here and now. Empty: both learners share one backbone
            and one pass.
        channels: Width of the meta learner's head.
        dropout: Share of channels dropped after the two projections while training.
        grid: The stage whose resolution the head works at, "layer3" (official) or "layer2".
        prior_stages: Stages whose features give a prior mask each, of 2, 3 and 4; officially 4 alone.
        init: Of the meta learner, "default" (torch's, official) or "kaiming", with which it learns sooner.

    Raises:
        ValueError: If an option has none of its values, or ``shot`` is below 1.

    Source:
        Lang et al., CVPR 2022, section 4.
    """

    any_shot = False  # whether numbers of shots other than ``shot`` fit

    def __init__(
        self,
        backbone: Backbone,
        shot: int = 1,
        *,
        base_learner: nn.Module,
        base_classes: Sequence[int],
        own_stages: Sequence[str] = (),
        channels: int = 256,
        dropout: float = 0.5,
        grid: str = "layer3",
        prior_stages: Sequence[int] = (4,),
        init: str = "default",
    ) -> None:
        super().__init__()
        stages = dict(backbone.named_children())
        own = sorted({name.split(".")[0] for name in own_stages})
        check_options(grid, prior_stages, init, shot)
        if not set(own) <= set(stages):
            raise ValueError(f"own_stages must be some of {', '.join(stages)}; got {list(own_stages)}")
        self.backbone = backbone
        self.shot = shot
        self.own_stages = tuple(own)
        self.grid = grid
        self.prior_stages = tuple(prior_stages)

        self.learner_base = base_learner.requires_grad_(False)
        self.base_classes: Tensor
        self.register_buffer("base_classes", torch.tensor(list(base_classes)), persistent=False)
        if own:  # what deepcopy finds in its memo, it shares
            shared = {id(stage): stage for name, stage in stages.items() if name not in own}
            self.base_backbone = copy.deepcopy(backbone, shared)
            for name in own:
                self.base_backbone.get_submodule(name).requires_grad_(False)

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

        self.gram_merge = _keep_the_first()
        self.cls_merge = _keep_the_first()
        if shot > 1:
            self.kshot_rw = nn.Sequential(nn.Conv2d(shot, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(2, shot, 1))
        self.train(self.training)  # Lightning leaves modes as it finds them

    def train(self, mode: bool = True) -> "BAM":
        """Set training mode; BatchNorm of the base learner stays in eval mode, like the backbone's."""
        super().train(mode)
        for module in self.learner_base.modules():
            if is_batch_norm(module):
                module.eval()
        return self

    def forward(self, episode: Episode) -> Prediction:
        """Predict the query's mask.

        Args:
            episode: With ``shot`` supports each. In training its ``class_id`` is read, too.

        Returns:
            The ensemble as logits, and the meta learner's as auxiliary ``"meta"``; each ``(B, 2, H, W)``.

        Raises:
            ValueError: If the number of supports is not ``shot``, or, in training, if stages train that the
                base learner shares.
        """
        outputs = self.outputs(episode)
        size = episode.query_image.shape[-2:]
        return Prediction(resize(outputs.ensemble, size), {"meta": resize(outputs.meta, size)})

    def outputs(self, episode: Episode) -> Outputs:
        """Compute what :meth:`forward` predicts, and the base learner's part in it."""
        batch, shots = episode.support_masks.shape[:2]
        if shots != self.shot:
            raise ValueError(
                f"this BAM weighs {self.shot} shot(s) and got {shots}; take or train one with shot={shots}"
            )
        masks = foreground(episode.support_masks.flatten(0, 1), episode.query_image)  # (BK, H, W)
        images = one_batch(episode.query_image, episode.support_images)
        see_all = masks.new_ones(batch, *masks.shape[1:])
        features = self.backbone(images, layer4_mask=torch.cat([see_all, masks]))[2:]  # of B + BK images
        query, prototypes, priors = compare(
            features, masks, self.down_query, self.down_supp, self.grid, self.prior_stages
        )  # (B, C, h, w), (B, K, C), (B, K, stages, h, w)
        size = query.shape[-2:]

        # "Ensemble": how unlike the query each support is as a whole. "K-Shot Setting": so is it heard.
        low = resize(features[0], size)
        differences = gram_difference(low[:batch], low[batch:].unflatten(0, (batch, shots)))
        differences = differences.to(self.gram_merge.weight.dtype)  # (B, K)
        weights = self.shot_weights(differences)  # (B, K)
        adjustment = (weights * differences).sum(dim=1)[:, None, None, None]  # psi, (B, 1, 1, 1)
        prototype = torch.einsum("bk,bkc->bc", weights, prototypes)[:, :, None, None]
        prior = torch.einsum("bk,bkshw->bshw", weights, priors)

        # "Meta Learner"
        x = self.init_merge(torch.cat([query, prototype.expand_as(query), prior], dim=1))
        x = self.res1_meta(self.ASPP_meta(x))
        x = self.res2_meta(x) + x
        meta = self.cls_meta(x)  # (B, 2, h, w)

        # "Base Learner"
        with torch.no_grad():
            base = resize(self.learner_base(self._base_features(episode.query_image, features[2])), size)
            counted = self._counted(episode.class_id).to(base.dtype)
            base_map = (base.softmax(dim=1)[:, 1:] * counted).sum(dim=1, keepdim=True)

        # "Ensemble"
        psi = adjustment.expand(-1, 1, *size)
        background, wanted = (
            self.gram_merge(torch.cat([probability, psi], dim=1))  # (B, 1, h, w)
            for probability in meta.softmax(dim=1).split(1, dim=1)
        )
        background = self.cls_merge(torch.cat([background, base_map], dim=1))
        return Outputs(torch.cat([background, wanted], dim=1), meta, base)

    def shot_weights(self, differences: Tensor) -> Tensor:
        """Weights of the shots, which add up to 1.

        The layer sees the differences in ascending order, so the order of the supports makes no difference.

        Args:
            differences: Of each support from its query, ``(B, K)``.

        Returns:
            Weights, shape ``(B, K)``, in [0, 1].
        """
        if self.shot == 1:
            return torch.ones_like(differences)
        ascending, order = differences.sort(dim=1)
        weights = self.kshot_rw(ascending[:, :, None, None])[:, :, 0, 0]
        return weights.gather(1, order.argsort(dim=1)).softmax(dim=1)

    def _base_features(self, query: Tensor, shared: Tensor) -> Tensor:
        """Features of stage 4 as the base learner knows them, ``(B, C, h, w)``."""
        if self.training:
            for name, stage in self.backbone.named_children():
                if name not in self.own_stages and any(p.requires_grad for p in stage.parameters()):
                    raise ValueError(
                        f"{name} of the backbone trains, but the base learner shares it: "
                        "name it in model.network.own_stages, or freeze it"
                    )
        return self.base_backbone(query)[4] if self.own_stages else shared[: len(query)]

    def _counted(self, class_id: Tensor) -> Tensor:
        """Which base classes enter the base map of each episode: 1 or 0, ``(B, base classes, 1, 1)``."""
        own = class_id[:, None] == self.base_classes
        return 1 - (own & self.training).float()[:, :, None, None]


def gram_difference(query: Tensor, supports: Tensor, eps: float = 1e-7) -> Tensor:
    """How differently the channels of two images go together: 0 for the same image.

    Args:
        query: Low-level features, shape ``(B, C, h, w)``.
        supports: Those of the supports, shape ``(B, K, C, h, w)``.
        eps: Keeps the division finite where a channel is zero everywhere.

    Returns:
        Root of the mean squared difference of the channels' cosines, shape ``(B, K)``, in [0, 2].

    Source:
        Lang et al., CVPR 2022, "Ensemble": the Frobenius norm of the difference of two Gram matrices. Theirs
        in code are of normalised channels, and divided by the norm of a matrix of ones.
    """

    def gram(features: Tensor) -> Tensor:
        flat = features.flatten(-2)  # (..., C, P)
        norms = flat.norm(dim=-1)
        return flat @ flat.mT / (norms[..., :, None] * norms[..., None, :] + eps)  # (..., C, C)

    # A difference of nearly equal numbers: half precision would leave nothing of it.
    with torch.autocast(query.device.type, enabled=False):
        dtype = torch.promote_types(query.dtype, torch.float32)
        return (gram(query.to(dtype))[:, None] - gram(supports.to(dtype))).norm(dim=(2, 3)) / query.shape[1]


def _keep_the_first() -> nn.Conv2d:
    """A learned weighted sum of two maps that begins as the first of them."""
    merge = nn.Conv2d(2, 1, 1, bias=False)
    with torch.no_grad():
        merge.weight.copy_(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1))
    return merge
