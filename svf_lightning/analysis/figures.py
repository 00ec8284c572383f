"""Pictures for people who would rather look."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from svf_lightning.episode import FOREGROUND, IGNORE, Episode
from svf_lightning.metrics import intersection_and_union

SUPPORT_COLOUR = (255, 200, 0)
TRUTH_COLOUR = (0, 220, 90)
PREDICTION_COLOUR = (255, 40, 110)


def overlay(
    image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], strength: float = 0.55
) -> np.ndarray:
    """Tint the foreground of a picture; ignored pixels turn grey.

    Args:
        image: uint8, ``(H, W, 3)``.
        mask: 0, 1 or 255, ``(H, W)``.
        colour: Red, green and blue, 0..255.
        strength: Share of the colour in a tinted pixel.
    """
    out = image.astype(np.float32)
    for value, tint in ((FOREGROUND, colour), (IGNORE, (128, 128, 128))):
        out[mask == value] = (1 - strength) * out[mask == value] + strength * np.asarray(tint, np.float32)
    return out.round().astype(np.uint8)


def to_picture(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undo the normalisation of an image ``(3, H, W)``: uint8, ``(H, W, 3)``."""
    pixels = image.numpy().transpose(1, 2, 0) * np.asarray(std) + np.asarray(mean)
    return (255 * pixels).round().clip(0, 255).astype(np.uint8)


def episode_grid(
    kept: Sequence[tuple[Episode, Tensor, Tensor]],
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    path: Path,
) -> None:
    """Draw one row per episode: supports with their masks, query, truth and prediction.

    Args:
        kept: Single episodes with the true and the predicted mask at original resolution ``(H, W)``.
        class_names: Class id c is ``class_names[c - 1]``.
        mean: What the images were normalised with.
        std: Likewise.
        path: The PNG to write.
    """
    import matplotlib.pyplot as plt

    shots = kept[0][0].support_images.shape[0]
    titles = [
        *(f"support {k + 1}" if shots > 1 else "support" for k in range(shots)),
        "query",
        "truth",
        "prediction",
    ]
    columns = len(titles)
    size = 1.7
    fig, axes = plt.subplots(
        len(kept),
        columns,
        figsize=(size * columns, (size + 0.22) * len(kept)),
        squeeze=False,
        layout="constrained",
    )
    for row, (episode, truth, prediction) in zip(axes, kept, strict=True):
        height, width = truth.shape
        side = max(height, width)
        query = to_picture(episode.query_image, mean, std)
        shown = round(query.shape[0] * height / side), round(query.shape[1] * width / side)
        query = query[: shown[0], : shown[1]]  # without the letterbox's padding
        supports = [
            overlay(to_picture(image, mean, std), np.where(mask == IGNORE, 0, mask), SUPPORT_COLOUR)
            for image, mask in zip(episode.support_images, episode.support_masks.numpy(), strict=True)
        ]
        nearest = np.ix_(np.arange(shown[0]) * height // shown[0], np.arange(shown[1]) * width // shown[1])
        pictures = [
            *supports,
            query,
            overlay(query, truth.numpy()[nearest], TRUTH_COLOUR),
            overlay(query, prediction.numpy()[nearest], PREDICTION_COLOUR),
        ]
        intersection, union = intersection_and_union(prediction, truth)
        iou = intersection[1].item() / max(union[1].item(), 1)
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture)
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
        row[0].set_ylabel(class_names[int(episode.class_id) - 1], fontsize=9)
        row[-1].set_xlabel(f"IoU {100 * iou:.0f}", fontsize=8, labelpad=2)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    part = path.with_name(path.name + ".part")
    fig.savefig(part, dpi=110, format="png")
    plt.close(fig)
    part.replace(path)
