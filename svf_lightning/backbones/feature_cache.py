"""Keep the backbone's features of images, so that an image met again is not computed again."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from svf_lightning.backbones.backbone import Backbone


@contextmanager
def remember_features(backbone: Backbone, megabytes: int = 2048) -> Iterator[None]:
    """Within this context the backbone computes no image twice, as long as no gradient is wanted.

    A thousand test episodes of a fold show a few hundred images; several classes sought in one picture share
    its features; and so do all pictures that are compared with the same supports. An image is known by its
    pixels and its mask, so nothing has to be told who shows what. The weights must not change meanwhile.

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
    kept: OrderedDict[bytes, list[Tensor]] = OrderedDict()
    room = megabytes * 2**20

    def forward(images: Tensor, layer4_mask: Tensor | None = None) -> list[Tensor]:
        nonlocal room
        if torch.is_grad_enabled():
            return compute(images, layer4_mask)
        keys = _keys(images, layer4_mask)
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
        yield
    finally:
        del backbone.forward


def _keys(images: Tensor, mask: Tensor | None) -> list[bytes]:
    """A digest of each image with its mask, and of what autocast makes of it."""
    device = images.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else images.dtype
    parts = [images, *([] if mask is None else [mask])]
    arrays = [part.detach().cpu().contiguous().view(torch.uint8).numpy() for part in parts]
    return [
        hashlib.blake2b(b"".join(array[i].tobytes() for array in arrays) + str(dtype).encode()).digest()
        for i in range(len(images))
    ]


def _size(features: Sequence[Tensor]) -> int:
    """Bytes of the features of one image."""
    return sum(feature.nbytes for feature in features)
