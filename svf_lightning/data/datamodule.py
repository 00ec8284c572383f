"""The stages of a run and their loaders: base classes for training, novel ones for validation and test."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from svf_lightning.data.episodes import EpisodeDataset, EpochSampler, NovelImages, collate
from svf_lightning.data.index import Source
from svf_lightning.data.transforms import Augment, Letterbox


class FewShotDataModule(pl.LightningDataModule):
    """Episodes of one fold of a data set.

    Training draws base classes from the ``"train"`` images, augmented; its batches are an `Episode`.
    Validation and test draw *novel* classes from the ``"val"`` images, letterboxed; their batches are an
    `Episode` and the list of the queries' masks at original resolution. Both take their episodes from the
    beginning of the same fixed sequence. Choosing a checkpoint on novel classes is the field's habit, as the
    protocol has no validation classes; a report should say so.

    Each process of a distributed run loads its own share, so the Trainer needs
    ``use_distributed_sampler=False``.

    Args:
        source: The data set: a `Pascal`, an `Emoji`, or anything that keeps the `Source` protocol.
        fold: Which quarter of the classes is novel, counted from 0.
        shot: Support images per episode.
        image_size: Side of the square images that the network gets, in pixels.
        batch_size: Episodes in a training batch, on each device. An incomplete last batch is left out.
        mean: Mean of each channel as the backbone wants it, for images in [0, 1].
        std: Standard deviation of each channel, likewise.
        augment: Settings of `Augment` other than size, mean and std; None takes its defaults.
        letterbox: Settings of `Letterbox`, likewise.
        seed: Of the training order, of every draw and every augmentation, and of the test episodes.
        workers: Processes that load, per stage; 0 loads in the process that trains.
        novel_images: ``"drop"`` trains without the images that show a novel class (BAM, SVF);
            ``"background"`` keeps them (PFENet, CyCTR).
        episodes_per_epoch: Training episodes in an epoch, over all devices; None takes one per query image.
        val_episodes: Validation episodes, over all devices.
        test_episodes: Test episodes, likewise.
        test_batch_size: Episodes in a batch of validation or test. It changes no result.

    Raises:
        ValueError: If fold, ``image_size`` or an augmentation setting is not possible. What depends on the
            images, such as too few of a class, raises in ``setup``.
    """

    def __init__(
        self,
        source: Source,
        *,
        fold: int,
        shot: int,
        image_size: int,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Mapping[str, Any] | None = None,
        letterbox: Mapping[str, Any] | None = None,
        seed: int = 0,
        workers: int = 0,
        novel_images: NovelImages = "drop",
        episodes_per_epoch: int | None = None,
        val_episodes: int = 1000,
        test_episodes: int = 1000,
        test_batch_size: int = 1,
    ) -> None:
        super().__init__()
        self.source, self.shot, self.seed = source, shot, seed
        self.base_classes, self.novel_classes = source.classes(fold)
        self.augment = _build(Augment, "augment", image_size, mean, std, augment)
        self.letterbox = _build(Letterbox, "letterbox", image_size, mean, std, letterbox)
        self.novel_images = novel_images
        self.batch_size, self.test_batch_size, self.workers = batch_size, test_batch_size, workers
        self.episodes_per_epoch = episodes_per_epoch
        self.val_episodes, self.test_episodes = val_episodes, test_episodes

    def prepare_data(self) -> None:
        self.source.prepare()
        # Lightning lets one process run this before all others go on, so these find the counts in the cache.
        self.source.index("train")
        self.source.index("val")

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.train_set = EpisodeDataset(
                self.source.index("train"),
                self.base_classes,
                self.shot,
                self.augment,
                seed=self.seed,
                min_pixels=self.source.min_pixels,
                novel_images=self.novel_images,
            )
        if stage in ("fit", "validate"):
            self.val_set = self._fixed_episodes(self.val_episodes)
        if stage == "test":
            self.test_set = self._fixed_episodes(self.test_episodes)

    def train_dataloader(self) -> DataLoader:
        sampler = EpochSampler(len(self.train_set), self.seed, episodes=self.episodes_per_epoch)
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} is more than the {len(sampler)} training episodes of an epoch "
                "on one device, so no batch would be full; lower batch_size or raise episodes_per_epoch"
            )
        return self._loader(self.train_set, sampler, batch_size=self.batch_size, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return self._fixed_loader(self.val_set)

    def test_dataloader(self) -> DataLoader:
        return self._fixed_loader(self.test_set)

    def _fixed_episodes(self, length: int) -> EpisodeDataset:
        return EpisodeDataset(
            self.source.index("val"),
            self.novel_classes,
            self.shot,
            self.letterbox,
            seed=self.seed,
            min_pixels=self.source.min_pixels,
            fixed=True,
            length=length,
        )

    def _fixed_loader(self, dataset: EpisodeDataset) -> DataLoader:
        sampler = EpochSampler(len(dataset), self.seed, shuffle=False)
        return self._loader(dataset, sampler, batch_size=self.test_batch_size, collate_fn=collate)

    def _loader(self, dataset: EpisodeDataset, sampler: EpochSampler, **options: Any) -> DataLoader:
        # Nothing is seeded in the workers: episodes bring their own generators. Nor are their threads
        # limited here: torch gives a worker one.
        return DataLoader(
            dataset,
            sampler=sampler,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            **options,
        )


def own_images(source: Source, *, root: Any = None, novel: Any = None, **options: Any) -> FewShotDataModule:
    """The data module over a `Folder`, for conf/data/folder.yaml.

    ``root`` and ``novel`` are there to be short to type (``data.root=my_photos``); ``source`` has them.
    """
    return FewShotDataModule(source, **options)


def _build(
    transform: Any,
    argument: str,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    settings: Mapping[str, Any] | None,
) -> Any:
    """A transform from its settings, refusing unknown ones by the name of the argument they came in."""
    settings = settings or {}
    known = {field.name for field in fields(transform)} - {"size", "mean", "std"}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"{argument} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return transform(size, tuple(mean), tuple(std), **settings)
