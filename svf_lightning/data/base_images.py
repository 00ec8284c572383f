"""Whole images with the labels of all base classes at once: what a base learner is trained on."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from svf_lightning.data.episodes import EpochLoader, EpochSampler, Transform, batches_done
from svf_lightning.data.source import ImageIndex, Source
from svf_lightning.data.transforms import Augment, Letterbox
from svf_lightning.episode import BACKGROUND, IGNORE

_AUGMENT = 5  # role of the generators, after those of episodes


class BaseImages(Dataset[tuple[Tensor, Tensor]]):
    """Images of an index with labels 1..n for the n base classes; novel classes are background there.

    Every image of the index counts, however little it shows: neither the size filter nor the training trick
    of episodes applies, as in the original. ``images[epoch, i]`` is augmented anew in every epoch;
    ``images[i]`` is the same at epoch 0.

    Args:
        index: The images.
        classes: Ids of the base classes; the i-th of them, counted from 1, becomes label i.
        transform: `Augment` or `Letterbox`.
        seed: Everything drawn follows from it.

    Source:
        Stage 1 of BAM (Lang et al., CVPR 2022) in chunbolang/BAM.
    """

    def __init__(self, index: ImageIndex, classes: Sequence[int], transform: Transform, *, seed: int) -> None:
        self.index, self.transform, self.seed = index, transform, seed
        self.labels = torch.full((256,), BACKGROUND, dtype=torch.uint8)  # of every class id
        self.labels[list(classes)] = torch.arange(1, len(classes) + 1, dtype=torch.uint8)
        self.labels[IGNORE] = IGNORE

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, i = key if isinstance(key, tuple) else (0, key)
        image, label = self.index.read(i)
        generator = np.random.default_rng([self.seed, epoch + 1, i, _AUGMENT])
        image, label = self.transform(image, self.labels[label.long()], generator)
        return image, label.long()


class BaseDataModule(pl.LightningDataModule):
    """Training and validation images of one fold's base classes.

    Batches are images ``(N, 3, H, W)`` and labels ``(N, H, W)``. Validation takes the data set's ``"val"``
    images, letterboxed; novel classes are background in them, too, so choosing weights by it learns nothing
    about novel classes.

    Args:
        source: The data set.
        classes: Ids of the base classes to learn; all others are background.
        image_size: Side of the square images that the network gets, in pixels.
        batch_size: Images in a batch, on each device; at least 2, since BatchNorm compares them.
        mean: Mean of each channel as the backbone wants it, for images in [0, 1].
        std: Standard deviation of each channel, likewise.
        augment: Settings of `Augment` other than size, mean and std.
        seed: Of the order and of every augmentation.
        workers: Processes that load, per stage.

    Raises:
        ValueError: If ``batch_size`` or an augmentation setting is not possible.
    """

    def __init__(
        self,
        source: Source,
        *,
        classes: Sequence[int],
        image_size: int,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Mapping[str, Any] | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise ValueError(f"base.batch_size={batch_size}: BatchNorm needs at least 2 images in a batch")
        self.source, self.seed, self.workers = source, seed, workers
        self.classes = tuple(classes)
        self.augment = Augment(image_size, tuple(mean), tuple(std), **(augment or {}))
        self.letterbox = Letterbox(image_size, tuple(mean), tuple(std))
        self.batch_size = batch_size

    def prepare_data(self) -> None:
        self.source.ensure()

    def setup(self, stage: str | None = None) -> None:
        if stage in ("fit", "validate", None):
            train, val = self.source.index("train"), self.source.index("val")
            self.train_set = BaseImages(train, self.classes, self.augment, seed=self.seed)
            self.val_set = BaseImages(val, self.classes, self.letterbox, seed=self.seed)

    def train_dataloader(self) -> DataLoader:
        if len(self.train_set) < self.batch_size:
            raise ValueError(
                f"base.batch_size={self.batch_size} is more than the {len(self.train_set)} training images"
            )
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val_set, shuffle=False)

    def _loader(self, images: BaseImages, shuffle: bool) -> DataLoader:
        sampler = EpochSampler(len(images), self.seed, shuffle=shuffle)
        return EpochLoader(
            images,
            batch_size=self.batch_size,
            sampler=sampler,
            done=partial(batches_done, self) if shuffle else None,
            drop_last=shuffle,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
