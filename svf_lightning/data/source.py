"""What a data set offers: its classes, its folds, and an index of its images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

Split = Literal["train", "val"]


@dataclass(frozen=True, eq=False)  # eq would compare arrays, which has no single truth value
class ImageIndex:
    """The images of a data set and how many pixels of every class each one shows."""

    name: str  # of the data set: "emoji", "pascal", ...
    class_names: tuple[str, ...]  # class id c, from 1 to N, is class_names[c - 1]
    ids: tuple[str, ...]  # one per image; what messages and pictures call it
    pixels: np.ndarray  # (images, N + 1) int64, at original resolution; column 0 is background
    read: Callable[[int], tuple[Tensor, Tensor]]  # image uint8 (3, H, W) RGB, label (H, W)

    def __len__(self) -> int:
        return len(self.ids)


class Source(Protocol):
    """What a data set offers: a frozen dataclass of plain settings with these members."""

    @property
    def name(self) -> str: ...

    @property
    def edition(self) -> str:
        """What else tells this data set from others of its name: the convention of its folds, its year."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def min_pixels(self) -> int:
        """Pixels of a class that an image must show to count as an image of that class."""

    def ensure(self) -> None:
        """Make the data or check that it is there. Called once, in the main process."""

    def index(self, split: Split) -> ImageIndex:
        """Index the images of ``"train"`` or ``"val"``."""

    def classes(self, fold: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Base and novel class ids of a fold, as :func:`folds.split_classes` gives them."""
