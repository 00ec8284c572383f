"""Features of an image computed once, however many episodes show it."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from svf_lightning.backbones.backbone import Backbone
from svf_lightning.episode import Episode


class FeatureCache:
    """What `remember_features` hands out: whoever has the episodes may say which one is being segmented.

    Attributes:
        episode: Its images are known by their positions in the data set, if it has them. None, or any other
            image, is known by its pixels, which takes longer.
    """

    episode: Episode | None = None


@contextmanager
def remember_features(backbone: Backbone, megabytes: int = 2048) -> Iterator[FeatureCache]:
    """Within this context the backbone computes no image twice, as long as no gradient is wanted.

    A thousand test episodes of a fold show a few hundred images; several classes sought in one picture share
    its features; and so do all pictures that are compared with the same supports. Weights and data set must
    not change meanwhile.

    Args:
        backbone: Its ``forward`` is replaced meanwhile.
        megabytes: Of features to keep; those asked for longest ago give way.

    Example:
        >>> from svf_lightning.backbones.efficientnet import efficientnet_lite0
        >>> backbone, image = efficientnet_lite0(weights=None), torch.zeros(1, 3, 33, 33)
        >>> with torch.no_grad(), remember_features(backbone):
        ...     first, again = backbone(image), backbone(torch.cat([image, image + 1]))
        >>> torch.equal(first[4][0], again[4][0])
        True
    """
    compute = backbone.forward
    cache = FeatureCache()
    kept: OrderedDict[bytes, list[Tensor]] = OrderedDict()
    room = megabytes * 2**20

    def forward(images: Tensor, layer4_mask: Tensor | None = None) -> list[Tensor]:
        nonlocal room
        if torch.is_grad_enabled():
            return compute(images, layer4_mask)
        keys = _keys(images, layer4_mask, cache.episode)
        features = {key: kept[key] for key in keys if key in kept}
        new = list({key: i for i, key in enumerate(keys) if key not in kept}.values())
        if new:
            stages = compute(images[new], None if layer4_mask is None else layer4_mask[new])
            for position, i in enumerate(new):
                # a copy: a view would keep the whole batch alive
                features[keys[i]] = kept[keys[i]] = [stage[position].clone() for stage in stages]
                room -= _size(kept[keys[i]])
        for key in keys:
            kept.move_to_end(key)
        while room < 0:
            room += _size(kept.popitem(last=False)[1])
        return [torch.stack(stage) for stage in zip(*(features[key] for key in keys), strict=True)]

    backbone.forward = forward  # type: ignore[method-assign]
    try:
        yield cache
    finally:
        del backbone.forward


def _keys(images: Tensor, mask: Tensor | None, episode: Episode | None) -> list[bytes]:
    """A name for each image with its mask, and for what autocast makes of it."""
    device = images.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else images.dtype
    positions = _positions(images, episode)
    names = _digests(images) if positions is None else [str(position).encode() for position in positions]
    masks = [b""] * len(images) if mask is None else _digests(mask)
    kind = f" {positions is None} {mask is None} {dtype} ".encode()
    return [name + kind + of_mask for name, of_mask in zip(names, masks, strict=True)]


def _positions(images: Tensor, episode: Episode | None) -> list[int] | None:
    """Positions of a batch of images in the data set, if it is an episode's queries, supports, or both."""
    if episode is None or episode.query_id is None or episode.support_ids is None:
        return None
    queries, supports = episode.query_image, episode.support_images.flatten(0, 1)
    query_ids, support_ids = episode.query_id.tolist(), episode.support_ids.flatten().tolist()
    if len(images) == len(queries) + len(supports):
        both = torch.equal(images[: len(queries)], queries) and torch.equal(images[len(queries) :], supports)
        return query_ids + support_ids if both else None
    if images.shape == queries.shape and torch.equal(images, queries):
        return query_ids
    return support_ids if images.shape == supports.shape and torch.equal(images, supports) else None


def _digests(tensor: Tensor) -> list[bytes]:
    array = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return [hashlib.blake2b(row.tobytes()).digest() for row in array]


def _size(features: Sequence[Tensor]) -> int:
    """Bytes of the features of one image."""
    return sum(feature.nbytes for feature in features)
