"""What travels between the rooms: an episode goes in, a prediction comes out.

Shape letters, used in every docstring and shape comment of the package:

    B    episodes in a batch          C    channels
    K    shots: support images        H W  height and width
    R    rank                         O I  output and input channels

Mask values: 0 background, 1 the episode's class, 255 ignored.
"""

from typing import NamedTuple

from torch import Tensor

BACKGROUND = 0
FOREGROUND = 1
IGNORE = 255


class Episode(NamedTuple):
    """One few-shot task, or a batch of them: segment in the query what the supports show.

    A named tuple of tensors, so that collating, pinning and moving to a device work untouched.
    A single episode, as a data set returns it, has the same fields without ``B``.
    """

    query_image: Tensor  # (B, 3, H, W) normalised as the backbone expects
    query_mask: Tensor  # (B, H, W) long
    support_images: Tensor  # (B, K, 3, H, W)
    support_masks: Tensor  # (B, K, H, W) long
    class_id: Tensor  # (B,) long, the data set's id of the class, counted from 1
    query_id: Tensor | None = None  # (B,) long, the image's position in the data set's index
    support_ids: Tensor | None = None  # (B, K) long, likewise


class Prediction(NamedTuple):
    """What a method says about a batch of queries."""

    logits: Tensor  # (B, 2, H, W) background and foreground, at the query's size
    auxiliary: dict[str, Tensor] = {}  # further logits that a loss may use; never written to
