"""A data set in memory for tests: images of noise, labels painted row by row, sizes that differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from svf_lightning.data.source import ImageIndex

CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox")


def scene(counts: Mapping[int, int], height: int, width: int) -> Tensor:
    """A label with exactly ``counts[c]`` pixels of value ``c``, 255 included, in runs from the top left."""
    runs = [np.full(count, class_id, np.uint8) for class_id, count in counts.items()]
    flat = np.concatenate([*runs, np.zeros(height * width - sum(map(len, runs)), np.uint8)])
    return torch.from_numpy(flat.reshape(height, width))


def read(labels: Sequence[Tensor], position: int) -> tuple[Tensor, Tensor]:
    label = labels[position]
    noise = np.random.default_rng(position).integers(0, 256, (3, *label.shape), dtype=np.uint8)
    return torch.from_numpy(noise), label


def index_of(scenes: Sequence[Mapping[int, int]]) -> ImageIndex:
    """An index of one image per scene; image i is ``40 + i % 3`` pixels high and 48 wide."""
    labels = [scene(counts, 40 + i % 3, 48) for i, counts in enumerate(scenes)]
    pixels = np.zeros((len(scenes), len(CLASSES) + 1), np.int64)
    for row, counts in zip(pixels, scenes, strict=True):
        for class_id, count in counts.items():
            if class_id != 255:
                row[class_id] = count
    return ImageIndex(
        "scenes", CLASSES, tuple(f"scene{i}" for i in range(len(scenes))), pixels, partial(read, labels)
    )


def mixed(images: int) -> list[dict[int, int]]:
    """Images with one to three of the six classes, each in half of them or so, and some ignored pixels."""
    generator = np.random.default_rng(images)
    chosen = (generator.choice(6, size=1 + i % 3, replace=False) + 1 for i in range(images))
    return [{255: 30, **{int(c): int(generator.integers(150, 400)) for c in classes}} for classes in chosen]


@dataclass(frozen=True)
class Scenes:
    """A `Source`: 60 training and 40 test images; fold f tests two of the six classes."""

    min_pixels: int = 100
    name: str = "scenes"
    edition: str = "made up"
    class_names: tuple[str, ...] = CLASSES

    def ensure(self) -> None:
        pass

    def index(self, split: str) -> ImageIndex:
        return index_of(mixed({"train": 60, "val": 40}[split]))

    def classes(self, fold: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        novel = (2 * fold + 1, 2 * fold + 2)
        return tuple(c for c in range(1, 7) if c not in novel), novel
