"""CyCTR: query positions attend to support positions, but only to those that find their way back.

Paper: Zhang et al., Few-Shot Segmentation via Cycle-Consistent Transformer, NeurIPS 2021
(arXiv:2106.02320). Deformable attention: Zhu et al., Deformable DETR, ICLR 2021.
Original code: YanFangCS/CyCTR-Pytorch; rewritten here from its behaviour, nothing copied. Module names
are the official ones, so that checkpoints carry over.

Where we knowingly differ:

- ``sampling="aligned"``: a drawn support token keeps its own place in the mask. The official code draws
  from the tokens of one kind but looks mask and padding up at the same number among *all* tokens, so the
  cycle test reads the labels of other tokens. "official" does that; imported checkpoints need it, since
  they were trained so. Tokens of a kind that is taken whole without a draw keep their own label in both.
- In evaluation the tokens are drawn from the identity of the images, so that a score depends neither on
  the batch size nor on the number of workers. The official evaluation draws from a global stream.
- The padding of the query is read off its picture, since a label must not tell it at test time; the official
  code carries a mask along. Either can be handed to ``forward``.
- The deformable attention is ``grid_sample``, not a CUDA kernel, and the attention is PyTorch's fused one:
  the similarity of all pairs is looked at once, without a gradient, episode by episode, and not kept.
- ``addtional_proj`` of the official state dict is never used there and does not exist here.

Kept as published: the dropouts inside the attentions, the -10000 of an unwanted token (finite, so that an
image without any wanted token still attends to all alike), and one random number of tokens per layer.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svf_lightning.backbones.backbone import Backbone
from svf_lightning.episode import IGNORE, Episode, Prediction
from svf_lightning.models.blocks import (
    PAIRS_AT_ONCE,
    check_options,
    classifier,
    conv_relu,
    foreground,
    kaiming_fan_in_,
    masked_average_pool,
    one_batch,
    prior_mask,
    resize,
    two_convolutions,
)

Sampling = Literal["aligned", "official"]


class SupportTokens(NamedTuple):
    """Support positions of all shots of an episode, one after the other."""

    features: Tensor  # (B, S, C)
    is_object: Tensor  # (B, S) bool
    is_padding: Tensor  # (B, S) bool


def sample_tokens(tokens: SupportTokens, target: int, keys: Tensor, sampling: Sampling) -> SupportTokens:
    """Choose at most ``target`` object and ``target`` background tokens of each episode.

    A kind that has fewer gives all it has, and the other kind fills up. So every episode keeps
    ``min(2 * target, S)`` tokens, and the batch stays a tensor.

    Args:
        tokens: All tokens, ``S`` per episode.
        target: Wanted tokens of each kind.
        keys: Shape ``(B, S)``, in [0, 1): of each kind the tokens with the smallest keys are chosen.
        sampling: Whether a drawn token keeps its own labels ("aligned") or gets those of another one as in
            the official code: of the token that has, among all, the number that this one has in its kind.

    Returns:
        The chosen tokens, objects first.

    Source:
        Zhang et al., section 3.3: sparse sampling; numbers and filling up as in the official code.
    """
    is_object = tokens.is_object
    total = min(2 * target, is_object.shape[1])
    objects = is_object.sum(dim=1, keepdim=True)  # (B, 1)
    others = is_object.shape[1] - objects
    filled = torch.where(others < target, total - others, torch.full_like(objects, target))
    chosen_objects = torch.where(objects < target, objects, filled)

    order = (keys + ~is_object).argsort(dim=1, stable=True)  # objects first, both kinds shuffled
    place = torch.arange(total, device=order.device).expand(len(order), -1)
    place = torch.where(place < chosen_objects, place, place - chosen_objects + objects)
    chosen = order.gather(1, place)  # (B, total)

    labelled_as = chosen
    if sampling == "official":
        number = torch.where(is_object, is_object.cumsum(dim=1), (~is_object).cumsum(dim=1)) - 1
        drawn = torch.where(is_object, objects >= target, (objects < target) | (others >= target))
        own = torch.arange(is_object.shape[1], device=order.device)
        labelled_as = torch.where(drawn, number, own).gather(1, chosen)
    return SupportTokens(
        tokens.features.gather(1, chosen[:, :, None].expand(-1, -1, tokens.features.shape[2])),
        is_object.gather(1, labelled_as),
        tokens.is_padding.gather(1, labelled_as),
    )


def cycle_consistent(similarity: Tensor, is_object: Tensor) -> Tensor:
    """Tell which support tokens return to their own kind: to the query that fits best, and back.

    Args:
        similarity: Of every query with every support token, shape ``(B, heads, N, S)``.
        is_object: Label of every support token, shape ``(B, S)``, bool.

    Returns:
        Shape ``(B, heads, S)``, bool.

    Source:
        Zhang et al., section 3.2, equations 3 and 4.

    Example:
        >>> similarity = torch.tensor([[5.0, 1.0, 6.0], [0.0, 9.0, 0.0]])  # two queries, three supports
        >>> is_object = torch.tensor([[True, True, False]])
        >>> cycle_consistent(similarity[None, None], is_object)  # the first ends at the third: background
        tensor([[[False,  True,  True]]])
    """
    there = similarity.argmax(dim=2)  # (B, heads, S), the best query of each support token
    back = similarity.argmax(dim=3)  # (B, heads, N), the best support token of each query
    label = is_object[:, None].expand_as(there)
    return label.gather(2, back.gather(2, there)) == label


def sine_code(is_padding: Tensor, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Code each position by sines of its height and width, as shares of the picture inside the padding.

    Args:
        is_padding: Positions outside the picture, shape ``(B, h, w)``, bool.
        channels: Divisible by 4: the first half codes the height, the second the width.
        dtype: Of the result; not half precision, which cannot count the positions.

    Returns:
        Shape ``(B, h * w, channels)``.

    Source:
        Carion et al., DETR, ECCV 2020 (normalised, temperature 10000).
    """
    inside = (~is_padding).to(dtype)
    half = channels // 2
    exponent = 2 * (torch.arange(half, device=inside.device, dtype=dtype) // 2) / half
    codes = []
    for dim in (1, 2):
        steps = inside.cumsum(dim)
        share = steps / (steps.narrow(dim, -1, 1) + 1e-6)  # (B, h, w), in [0, 1]
        angle = 2 * math.pi * share[..., None] / 10000**exponent  # (B, h, w, C / 2)
        codes.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(3))
    return torch.cat(codes, dim=3).flatten(1, 2)


class DeformableAttention(nn.Module):
    """Each position looks at ``points`` places around it, which it chooses itself, per head.

    Args:
        channels: Of the tokens, divisible by ``heads``.
        heads: Each with places and weights of its own.
        points: Places per head. At the start they lie 1 to ``points`` positions away in the head's own
            direction, and all weigh the same.

    Source:
        Zhu et al., Deformable DETR, ICLR 2021, section 4.1, at one level.
    """

    def __init__(self, channels: int, heads: int = 8, points: int = 9) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.sampling_offsets = nn.Linear(channels, heads * points * 2)
        self.attention_weights = nn.Linear(channels, heads * points)
        self.value_proj = nn.Linear(channels, channels, bias=False)
        self.output_proj = nn.Linear(channels, channels, bias=False)
        # Fixed at 0.1 in the official code, whatever its other dropouts are.
        self.value_drop, self.attention_drop = nn.Dropout(0.1), nn.Dropout(0.1)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Look around evenly, whatever the query says."""
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        angle = 2 * math.pi * torch.arange(self.heads) / self.heads
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)  # (heads, 2)
        direction = direction / direction.abs().amax(dim=1, keepdim=True)
        steps = torch.arange(1, self.points + 1)[:, None]
        self.sampling_offsets.bias.copy_((direction[:, None] * steps).flatten())
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.output_proj.weight)

    def forward(self, query: Tensor, source: Tensor, is_padding: Tensor, size: tuple[int, int]) -> Tensor:
        """Gather from ``source`` what each query asks for.

        Args:
            query: What decides where to look, shape ``(B, h * w, C)``, row by row.
            source: What is looked at, likewise.
            is_padding: Positions seen as zero, shape ``(B, h * w)``, bool.
            size: ``(h, w)``.

        Returns:
            Shape ``(B, h * w, C)``.
        """
        height, width = size
        batch, positions, _ = query.shape
        value = self.value_proj(source)
        dtype = torch.promote_types(value.dtype, torch.float32)
        value = value.to(dtype)
        kept = self.value_drop(torch.ones_like(value[..., :1])) > 0  # whole tokens, and not rescaled
        value = value.masked_fill(is_padding[..., None] | ~kept, 0)
        value = value.mT.unflatten(1, (self.heads, -1)).flatten(0, 1).unflatten(2, size)  # (B heads, c, h, w)

        # Places in float32: eight bits of bfloat16 would move them by whole positions.
        offset = self.sampling_offsets(query).to(dtype).view(batch, positions, self.heads, self.points, 2)
        y, x = torch.meshgrid(
            (torch.arange(height, device=query.device, dtype=dtype) + 0.5) / height,
            (torch.arange(width, device=query.device, dtype=dtype) + 0.5) / width,
            indexing="ij",
        )
        centre = torch.stack([x, y], dim=-1).view(1, positions, 1, 1, 2)
        place = centre + offset / offset.new_tensor([width, height])
        weight = self.attention_weights(query).to(dtype).view(batch, positions, self.heads, self.points)
        weight = self.attention_drop(weight.softmax(dim=-1))

        grid = (2 * place - 1).transpose(1, 2).flatten(0, 1)  # (B heads, h w, points, 2), in [-1, 1]
        seen = F.grid_sample(value, grid, align_corners=False)  # (B heads, c, h w, points)
        out = (seen * weight.transpose(1, 2).flatten(0, 1)[:, None]).sum(dim=-1)  # (B heads, c, h w)
        return self.output_proj(out.unflatten(0, (batch, self.heads)).flatten(1, 2).mT.to(source.dtype))


class CycleAttention(nn.Module):
    """Multi-head attention of the query to those support tokens that are cycle-consistent.

    Args:
        channels: Of the tokens, divisible by ``heads``.
        heads: Each with a cycle of its own.
        dropout: Of attention weights and output; and the share of inconsistent tokens that are let
            through in training all the same.

    Source:
        Zhang et al., section 3.2, equations 2 to 5.
    """

    def __init__(self, channels: int, heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads = heads
        self.q_fc = nn.Linear(channels, channels, bias=False)
        self.k_fc = nn.Linear(channels, channels, bias=False)
        self.v_fc = nn.Linear(channels, channels, bias=False)
        self.proj = nn.Linear(channels, channels, bias=False)
        self.attn_drop, self.proj_drop = nn.Dropout(dropout), nn.Dropout(dropout)
        self.association_drop = nn.Dropout(dropout)

    def forward(self, query: Tensor, support: SupportTokens) -> Tensor:
        """Map query tokens ``(B, N, C)`` to what they find in the support, same shape."""
        q = self.q_fc(query).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, c)
        k = self.k_fc(support.features).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, S, c)
        v = self.v_fc(support.features).unflatten(2, (self.heads, -1)).transpose(1, 2)
        with torch.no_grad():  # of as many episodes at a time as memory is meant for
            at_once = max(1, PAIRS_AT_ONCE // (self.heads * q.shape[2] * k.shape[2]))
            some = zip(*(x.split(at_once) for x in (q, k, support.is_object)), strict=True)
            consistent = torch.cat([cycle_consistent(a @ b.mT, label) for a, b, label in some])
        unwanted = (self.association_drop((~consistent).float()) > 0).float() + support.is_padding[:, None]
        bias = -1e4 * unwanted
        # Softmax ignores a common shift. Without it, low precision would round q k away beside 10000.
        bias = (bias - bias.amax(dim=2, keepdim=True))[:, :, None].to(q.dtype)  # (B, heads, 1, S)
        dropout = self.attn_drop.p if self.attn_drop.training else 0.0
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        return self.proj_drop(self.proj(found.transpose(1, 2).flatten(2)))


class FFN(nn.Module):
    """Two linear layers on each token, added to it."""

    def __init__(self, channels: int, dropout: float = 0.1) -> None:
        super().__init__()
        widen = nn.Sequential(
            nn.Linear(channels, 3 * channels, bias=False), nn.ReLU(inplace=True), nn.Dropout(dropout)
        )
        self.layers = nn.Sequential(widen, nn.Linear(3 * channels, channels, bias=False))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, N, C)`` to ``(B, N, C)``."""
        return x + self.dropout(self.layers(x))


class CycleTransformer(nn.Module):
    """Layers of self-attention within the query, then cycle-consistent attention to the support.

    Args:
        channels: Of the tokens, divisible by ``heads`` and by 4.
        heads: Of both attentions.
        layers: How many times.
        dropout: After and within the attentions and the FFNs.
        tokens_per_shot: Wanted support tokens of each kind, object and background, per shot.
        sampling: See :func:`sample_tokens`.

    Source:
        Zhang et al., section 3.3; Fig. 2.
    """

    def __init__(
        self,
        channels: int = 256,
        heads: int = 8,
        layers: int = 2,
        dropout: float = 0.1,
        tokens_per_shot: int = 300,
        sampling: Sampling = "aligned",
    ) -> None:
        super().__init__()
        self.tokens_per_shot, self.sampling = tokens_per_shot, sampling
        self.qry_self_layers = nn.ModuleList(DeformableAttention(channels, heads) for _ in range(layers))
        self.cross_layers = nn.ModuleList(CycleAttention(channels, heads, dropout) for _ in range(layers))
        self.ffns = nn.ModuleList(FFN(channels, dropout) for _ in range(2 * layers))
        self.layer_norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(4 * layers))
        self.level_embed = nn.Parameter(torch.empty(1, channels))
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.level_embed)
        for part in (*self.cross_layers, *self.ffns):
            for linear in part.modules():
                if isinstance(linear, nn.Linear):
                    nn.init.xavier_uniform_(linear.weight)

    def forward(
        self, query: Tensor, is_padding: Tensor, support: SupportTokens, shots: int, keys: Tensor | None
    ) -> Tensor:
        """Enrich the query by what the support shows.

        Args:
            query: Shape ``(B, C, h, w)``.
            is_padding: Of the query, shape ``(B, h, w)``, bool.
            support: All tokens of all shots.
            shots: ``K``; the number of tokens that are drawn grows with it.
            keys: What the draw goes by, shape ``(B, S)``, in [0, 1). None draws anew in every layer, a random
                number of tokens: training.

        Returns:
            Shape ``(B, C, h, w)``.
        """
        size = (query.shape[2], query.shape[3])
        exact = torch.promote_types(query.dtype, torch.float32)
        position = sine_code(is_padding, query.shape[1], exact).to(self.level_embed.dtype)
        position = position + self.level_embed  # (B, N, C)
        outside = is_padding.flatten(1)
        q = query.flatten(2).mT  # (B, N, C)
        norms, ffns = iter(self.layer_norms), iter(self.ffns)
        chosen = None
        for attend_self, attend_support in zip(self.qry_self_layers, self.cross_layers, strict=True):
            q = next(norms)(q + self.dropout(attend_self(q + position, q, outside, size)))
            q = next(norms)(next(ffns)(q))
            if chosen is None or keys is None:
                chosen = self.choose(support, shots, keys)
            q = next(norms)(attend_support(q, chosen) + q)
            q = next(norms)(next(ffns)(q))
        return q.mT.unflatten(2, size)

    def choose(self, support: SupportTokens, shots: int, keys: Tensor | None) -> SupportTokens:
        """Draw support tokens: by ``keys``, or at random and a random number of them."""
        target = float(self.tokens_per_shot * shots)
        if keys is None:
            low, high = (0.6, 4.0) if shots == 1 else (0.6, 1.4)
            target *= low + (high - low) * torch.rand(()).item()
            keys = torch.rand_like(support.is_object, dtype=torch.float32)
        return sample_tokens(support, int(target), keys, self.sampling)


class CyCTR(nn.Module):
    """Segment the query by attending to the support pixels that are cycle-consistent with it.

    Any number of shots fits one set of weights. The transformer is trained by an optimizer of its own
    (``conf/model/cyctr.yaml``), and the loss is :func:`svf_lightning.training.losses.cyctr_dice`.

    Args:
        backbone: Five stages; features of stages 2 and 3 feed the head, stage 4 the prior mask. Its stages
            are run with a gradient wherever a fine-tune strategy wants one: singular values of stages 2 and
            3 learn from everything, those of stage 4 through the prior mask alone.
        shot: Supports per episode; recorded only.
        channels: Width of the head, divisible by 4 and by ``heads``.
        heads: Of the attentions.
        tokens_per_shot: Support positions of each kind, object and background, that the query may attend to,
            per shot. Training multiplies it by a random factor.
        sampling: "aligned", or "official" with the official code's mistake (see the top of this file).
        dropout: Share of channels dropped after the two projections while training.
        prior_stages: Stages whose features give a prior mask each, of 2, 3 and 4. Officially stage 4 alone.
        grid: The stage whose resolution the head works at, "layer3" (official) or "layer2".
        init: "default" is torch's initialisation of the convolutions (official); "kaiming" keeps signals
            alive through them and starts undecided, which learns faster in a short training.

    Raises:
        ValueError: If an option has none of its values.

    Source:
        Zhang et al., NeurIPS 2021, section 3.
    """

    any_shot = True  # whether numbers of shots other than ``shot`` fit

    def __init__(
        self,
        backbone: Backbone,
        shot: int = 1,
        *,
        channels: int = 256,
        heads: int = 8,
        tokens_per_shot: int = 300,
        sampling: Sampling = "aligned",
        dropout: float = 0.5,
        prior_stages: Sequence[int] = (4,),
        grid: str = "layer3",
        init: str = "default",
    ) -> None:
        super().__init__()
        if sampling not in ("aligned", "official"):
            raise ValueError(f"sampling must be 'aligned' or 'official', got {sampling!r}")
        check_options(grid, prior_stages, init)
        if channels % 4 or channels % heads:
            raise ValueError(f"channels must be divisible by 4 and by heads={heads}, got {channels}")
        if tokens_per_shot < 2:
            raise ValueError(f"tokens_per_shot must be 2 or more, got {tokens_per_shot}")
        self.backbone = backbone
        self.shot, self.grid, self.prior_stages = shot, grid, tuple(prior_stages)

        middle = backbone.channels[2] + backbone.channels[3]
        self.adjust_feature_supp = nn.Sequential(*conv_relu(middle, channels), nn.Dropout2d(dropout))
        self.adjust_feature_qry = nn.Sequential(*conv_relu(middle, channels), nn.Dropout2d(dropout))
        self.qry_merge_feat = nn.Sequential(*conv_relu(2 * channels + len(prior_stages), channels))
        self.supp_merge_feat = nn.Sequential(*conv_relu(2 * channels, channels))
        self.transformer = CycleTransformer(
            channels, heads, tokens_per_shot=tokens_per_shot, sampling=sampling
        )
        self.merge_multi_lvl_reduce = nn.Sequential(*conv_relu(channels, channels))
        self.merge_multi_lvl_sum = two_convolutions(channels)
        self.cls = classifier(channels)
        # The auxiliary task of training: segment the supports by the query.
        self.pred_supp_qry_proj = nn.Sequential(*conv_relu(channels, channels))
        self.supp_init_merge = nn.Sequential(*conv_relu(2 * channels, channels))
        self.supp_beta_conv = two_convolutions(channels)
        self.supp_cls = classifier(channels)
        if init == "kaiming":
            kaiming_fan_in_(*(m for n, m in self.named_children() if n not in ("backbone", "transformer")))
            for head in (self.cls, self.supp_cls):
                nn.init.normal_(head.get_parameter("3.weight"), std=0.01)

    def forward(
        self,
        episode: Episode,
        query_padding: Tensor | None = None,
        support_padding: Tensor | None = None,
    ) -> Prediction:
        """Predict the query's mask. In evaluation ``episode.query_mask`` is not read.

        Args:
            episode: With any number of supports.
            query_padding: Pixels outside the query's picture, shape ``(B, H, W)``, bool. None finds them by
                their colour (:func:`canvas`).
            support_padding: Support pixels not to attend to, shape ``(B, K, H, W)``, bool. None takes those
                with label 255: padding, and on PASCAL the objects' borders too, as in the official code.

        Returns:
            Logits ``(B, 2, H, W)`` at the query's size. In training also ``auxiliary["support"]``
            ``(B, K, 2, H, W)``: the supports segmented by the query and its true mask.
        """
        batch, shots = episode.support_images.shape[:2]
        image_size = episode.query_image.shape[-2:]
        masks = foreground(episode.support_masks.flatten(0, 1), episode.query_image)  # (BK, H, W)
        if query_padding is None:
            query_padding = canvas(episode.query_image, self.backbone.mean, self.backbone.std)
        if support_padding is None:
            support_padding = episode.support_masks == IGNORE

        # The supports go in whole: only the prior masks their stage 4 features, and after the stage.
        *_, f2, f3, f4 = self.backbone(one_batch(episode.query_image, episode.support_images))
        size = (f3 if self.grid == "layer3" else f2).shape[-2:]
        middle = torch.cat([resize(f2, size), resize(f3, size)], dim=1)  # stage 2 first, unlike PFENet
        query = self.adjust_feature_qry(middle[:batch])  # (B, C, h, w)
        support = self.adjust_feature_supp(middle[batch:])  # (BK, C, h, w)

        # One prototype and one prior mask (per stage that gives one) per support.
        prototypes = masked_average_pool(support, resize(masks[:, None], size)[:, 0])  # (BK, C)
        prototype = prototypes.unflatten(0, (batch, shots)).mean(dim=1)  # (B, C)
        priors = []
        for stage in self.prior_stages:
            feature = (f2, f3, f4)[stage - 2]
            masked = feature[batch:] * resize(masks[:, None], feature.shape[-2:])
            priors.append(resize(prior_mask(feature[:batch], masked), size))
        prior = torch.cat(priors, dim=1).unflatten(0, (batch, shots)).mean(dim=1)  # (B, stages, h, w)

        x = self.qry_merge_feat(torch.cat([query, _tile(prototype, query), prior.to(query.dtype)], dim=1))
        y = self.supp_merge_feat(torch.cat([support, _tile(prototypes, support)], dim=1))
        tokens = SupportTokens(
            y.unflatten(0, (batch, shots)).movedim(2, -1).flatten(1, 3),  # (B, K h w, C)
            _both_kinds(_nearest(masks, size)).view(batch, -1),
            _nearest(support_padding.flatten(0, 1), size).view(batch, -1),
        )
        keys = None if self.training else _episode_keys(episode, tokens.is_object)
        z = self.transformer(x, _nearest(query_padding, size), tokens, shots, keys)
        z = self.merge_multi_lvl_reduce(z)
        z = self.merge_multi_lvl_sum(z) + z
        logits = resize(self.cls(z), image_size)
        if not self.training:
            return Prediction(logits)

        # Section 3.4: the other way round, from the query's prototype to the supports.
        weight = resize(foreground(episode.query_mask, query)[:, None], size)[:, 0]
        seen = masked_average_pool(self.pred_supp_qry_proj(z) + query, weight).repeat_interleave(shots, dim=0)
        u = self.supp_init_merge(torch.cat([support, _tile(seen, support)], dim=1))
        u = self.supp_beta_conv(u) + u
        supports = resize(self.supp_cls(u), image_size).unflatten(0, (batch, shots))
        return Prediction(logits, {"support": supports})


def canvas(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Find what lies outside the picture by its colour.

    Training pads with the mean colour, exactly 0 after normalisation, which a photograph practically never
    has in three channels at once. A letterbox pads with black, below and to the right, in whole rows and
    columns; black borders that belong to the picture count as padding too, with no harm.

    Args:
        images: Normalised, shape ``(B, 3, H, W)``.
        mean: What they were normalised with, for images in [0, 1].
        std: Likewise.

    Returns:
        Shape ``(B, H, W)``, bool.

    Example:
        >>> image = torch.ones(1, 3, 2, 3)
        >>> image[..., 2] = -0.5 / 0.25  # black
        >>> image[..., 0, 0] = 0  # the mean colour
        >>> canvas(image, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)).int()
        tensor([[[1, 0, 1],
                 [0, 0, 1]]], dtype=torch.int32)
    """
    black = -images.new_tensor(mean) / images.new_tensor(std)
    is_black = ((images - black[:, None, None]).abs() < 0.01).all(dim=1)  # half a grey value of 255
    below = is_black.all(dim=2).flip(1).cummin(dim=1).values.flip(1)  # (B, H), True from a row to the last
    right = is_black.all(dim=1).flip(1).cummin(dim=1).values.flip(1)  # (B, W)
    return (images == 0).all(dim=1) | below[:, :, None] | right[:, None, :]


def _tile(vectors: Tensor, features: Tensor) -> Tensor:
    """Vectors ``(N, C)`` at every position of ``features (N, C, h, w)``."""
    return vectors[:, :, None, None].expand_as(features)


def _nearest(masks: Tensor, size: torch.Size) -> Tensor:
    """Masks ``(N, H, W)`` of zeros and ones at another size, bool."""
    return F.interpolate(masks[:, None].float(), size, mode="nearest")[:, 0] > 0


def _both_kinds(is_object: Tensor) -> Tensor:
    """Masks ``(N, h, w)`` in which no image is all background or all object, as the cycle needs both."""
    height, width = is_object.shape[1:]
    centre, corners = torch.zeros_like(is_object[0]), torch.zeros_like(is_object[0])
    centre[max(height // 2 - 1, 0) : height // 2 + 1, max(width // 2 - 1, 0) : width // 2 + 1] = True
    corners[:: max(height - 1, 1), :: max(width - 1, 1)] = True
    is_object = is_object | (centre & ~is_object.any(dim=(1, 2))[:, None, None])
    return is_object & ~(corners & is_object.all(dim=(1, 2))[:, None, None])


def _episode_keys(episode: Episode, like: Tensor) -> Tensor:
    """Random keys ``(B, S)`` in [0, 1) that follow from which images an episode has, and nothing else."""
    batch, count = like.shape
    ids = [[0]] * batch  # episodes without ids share one draw
    if episode.query_id is not None and episode.support_ids is not None:
        ids = torch.cat([episode.query_id[:, None], episode.support_ids], dim=1).tolist()
    # The numbers come from the CPU, so that they are the same on any device.
    keys = np.stack([np.random.default_rng(row).random(count, dtype=np.float32) for row in ids])
    return torch.from_numpy(keys).to(like.device)
