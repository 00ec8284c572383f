"""Draw figures: test episodes, changes of singular values, validation curves."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from svf_lightning.analysis.overlays import Colour, tint
from svf_lightning.episode import FOREGROUND, IGNORE, Episode
from svf_lightning.files import replace_file
from svf_lightning.training.metrics import intersection_and_union

SUPPORT_COLOUR = (255, 200, 0)
TRUTH_COLOUR = (0, 220, 90)
PREDICTION_COLOUR = (255, 40, 110)
RISE, FALL = "#c2410c", "#2563eb"  # singular values that grew, and that shrank


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
            _marked(to_picture(image, mean, std), np.where(mask == IGNORE, 0, mask), SUPPORT_COLOUR)
            for image, mask in zip(episode.support_images, episode.support_masks.numpy(), strict=True)
        ]
        nearest = np.ix_(np.arange(shown[0]) * height // shown[0], np.arange(shown[1]) * width // shown[1])
        pictures = [
            *supports,
            query,
            _marked(query, truth.numpy()[nearest], TRUTH_COLOUR),
            _marked(query, prediction.numpy()[nearest], PREDICTION_COLOUR),
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
    _save(fig, path)


def _marked(picture: np.ndarray, mask: np.ndarray, colour: Colour) -> Image.Image:
    return tint(Image.fromarray(picture), mask, {FOREGROUND: colour})


def spectra(
    stages: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]], folder: Path, name: str, title: str
) -> list[Path]:
    """Draw how singular values changed: a figure per stage, a row per kind of layer, a column per block.

    Args:
        stages: Stage to kind to block to changes ``(R,)``, of the largest value first; from
            :func:`svf_lightning.analysis.spectra.by_stage`.
        folder: Where the figures go, as ``<name>_<stage>.png``.
        name: First part of the file names.
        title: Stands above, before the stage.

    Returns:
        The files.

    Source:
        Figures 2 to 6 of Sun et al., NeurIPS 2022, arXiv:2206.06122.
    """
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for stage, kinds in stages.items():
        blocks = list(dict.fromkeys(block for row in kinds.values() for block in row))
        limit = max(float(np.abs(values).max()) for row in kinds.values() for values in row.values()) or 1.0
        fig, axes = plt.subplots(
            len(kinds),
            len(blocks),
            figsize=(1.2 + 1.7 * len(blocks), 0.9 + 1.15 * len(kinds)),
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for axis_row, (kind, row) in zip(axes, kinds.items(), strict=True):
            axis_row[0].set_ylabel(kind or "layer", fontsize=8)
            for axis, block in zip(axis_row, blocks, strict=True):
                if block not in row:
                    axis.set_axis_off()
                    continue
                values = row[block]
                if len(values) <= 40:
                    axis.bar(
                        np.arange(1, len(values) + 1),
                        values,
                        width=0.8,
                        color=np.where(values > 0, RISE, FALL),
                    )
                else:  # hundreds of bars would be thinner than a pixel
                    x = np.arange(1, len(values) + 1)
                    for sign, colour in ((1, RISE), (-1, FALL)):
                        part = np.where(sign * values > 0, values, 0)
                        axis.fill_between(x, part, step="mid", color=colour, linewidth=0)
                axis.axhline(0, color="0.6", linewidth=0.6)
                axis.set_ylim(-1.08 * limit, 1.08 * limit)
                axis.set_xlim(0.3, len(values) + 0.7)
                axis.tick_params(labelsize=6, length=2)
                axis.spines[["top", "right"]].set_visible(False)
        for axis, block in zip(axes[0], blocks, strict=True):
            axis.set_title(f"block {block}" if block else stage, fontsize=8)
        for axis_row in axes:  # a kind without a first block still needs its name
            if not axis_row[0].axison:
                axis_row[0].set_axis_on()
                axis_row[0].tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
                axis_row[0].spines[:].set_visible(False)
        fig.suptitle(f"{title}, {stage}", fontsize=9)
        fig.supxlabel("singular value, largest first", fontsize=8)
        fig.supylabel("change in training", fontsize=8)
        paths.append(folder / f"{name}_{stage}.png")
        _save(fig, paths[-1])
    return paths


def relative_changes(changes: Mapping[str, float], path: Path) -> None:
    """Draw one bar per layer: the length of its spectrum's change over that of its pretrained spectrum."""
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(max(4.0, 1.0 + 0.16 * len(changes)), 3.2), layout="constrained")
    stages = [name.partition(".")[0] for name in changes]
    colours = {stage: f"C{i}" for i, stage in enumerate(dict.fromkeys(stages))}
    axis.bar(range(len(changes)), [100 * c for c in changes.values()], color=[colours[s] for s in stages])
    axis.set_xticks(range(len(changes)), changes, rotation=90, fontsize=6)
    axis.set_xlim(-0.7, len(changes) - 0.3)
    axis.set_ylabel("change of the spectrum, %", fontsize=8)
    axis.tick_params(axis="y", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    _save(fig, path)


def learning_curves(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str, path: Path) -> None:
    """Draw the validation mIoU of strategies over epochs.

    Args:
        curves: Strategy to epochs ``(E,)`` and mIoU in ``[0, 1]``, ``(E,)``.
        title: Stands above.
        path: The PNG to write.

    Source:
        Figure 1 of Sun et al., NeurIPS 2022, arXiv:2206.06122.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    fig, axis = plt.subplots(figsize=(6.4, max(3.4, 0.6 + 0.17 * len(curves))), layout="constrained")
    order = sorted(curves, key=lambda name: -curves[name][1][-1] if len(curves[name][1]) else 0)
    for index, name in enumerate(order):  # as they end, from top to bottom; colours repeat after ten
        epochs, miou = curves[name]
        axis.plot(epochs, 100 * miou, ("o-", "s--", "^:")[index // 10 % 3], label=name, markersize=3)
    axis.set_xlabel("epoch", fontsize=8)
    axis.set_ylabel("novel-class mIoU, %", fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlim(0, 1.04 * max(float(epochs[-1]) for epochs, _ in curves.values()))
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    fig.legend(fontsize=7, frameon=False, loc="outside right upper")  # beside, or many would hide the curves
    axis.set_title(title, fontsize=8)
    _save(fig, path)


def _save(fig: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    replace_file(path, partial(fig.savefig, dpi=110, format="png"))
    plt.close(fig)
