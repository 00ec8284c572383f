"""The LightningDataModule: base classes for training, other classes for validation and test."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from svf_lightning.backbones.backbone import IMAGENET_MEAN, IMAGENET_STD
from svf_lightning.data.episode_list import read_episode_list
from svf_lightning.data.episodes import (
    Draw,
    EpisodeDataset,
    EpochLoader,
    EpochSampler,
    NovelImages,
    batches_done,
    collate,
)
from svf_lightning.data.folds import class_roles
from svf_lightning.data.protocol import Protocol, digest
from svf_lightning.data.source import ImageIndex, Source
from svf_lightning.data.transforms import Augment, Letterbox


class FewShotDataModule(pl.LightningDataModule):
    """Episodes of one fold of a data set.

    Training draws base classes from the ``"train"`` images, augmented; its batches are an `Episode`.
    Validation and test draw *novel* classes from the ``"val"`` images, letterboxed; their batches are an
    `Episode` and the list of the queries' masks at original resolution. Both take their episodes from the
    beginning of the same fixed sequence. Choosing a checkpoint on novel classes is the field's habit, as the
    protocol has no validation classes. With ``selection="base"`` validation draws base classes that training
    never shows, from ``"train"`` images, and so looks at neither novel classes nor test images.

    Each process of a distributed run loads its own share, so the Trainer needs
    ``use_distributed_sampler=False``.

    Args:
        source: The data set: a `Pascal`, an `Emoji`, or anything that keeps the `Source` protocol.
        fold: Which quarter of the classes is novel, counted from 0.
        shot: Support images per episode.
        image_size: Side of the square images that the network gets, in pixels.
        batch_size: Episodes in a training batch, on each device. An incomplete last batch is left out.
        mean: Mean of each channel as the backbone wants it, for images in [0, 1]. None takes that of the
            backbone under the Trainer, or ImageNet's where there is none.
        std: Standard deviation of each channel, likewise.
        augment: Settings of `Augment` other than size, mean and std; None takes its defaults.
        letterbox: Settings of `Letterbox`, likewise.
        seed: Of the training order, and of every draw and every augmentation in training.
        selection: How the tested weights are chosen: "novel", "base" or "last"; see `class_roles`.
        episode_seed: Of the validation and test episodes. Apart from ``seed``, so that runs with several
            seeds are tested on the same episodes.
        episode_list: A file of test episodes that are taken instead of drawn ones; see `episode_list`. It
            says their number, too.
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
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: Mapping[str, Any] | None = None,
        letterbox: Mapping[str, Any] | None = None,
        seed: int = 0,
        selection: str = "novel",
        episode_seed: int = 0,
        episode_list: str | Path | None = None,
        workers: int = 0,
        novel_images: NovelImages = "drop",
        episodes_per_epoch: int | None = None,
        val_episodes: int = 1000,
        test_episodes: int = 1000,
        test_batch_size: int = 1,
    ) -> None:
        super().__init__()
        self.source, self.fold, self.shot, self.seed = source, fold, shot, seed
        self.selection, self.episode_seed, self.episode_list = selection, episode_seed, episode_list
        self.roles = class_roles(*source.classes(fold), selection)
        self.mean, self.std = mean, std
        self.augment: Augment = _build(Augment, "augment", image_size, augment)
        self.letterbox: Letterbox = _build(Letterbox, "letterbox", image_size, letterbox)
        self.novel_images = novel_images
        self.batch_size, self.test_batch_size, self.workers = batch_size, test_batch_size, workers
        self.episodes_per_epoch = episodes_per_epoch
        self.val_episodes, self.test_episodes = val_episodes, test_episodes

    def prepare_data(self) -> None:
        self.source.ensure()
        # Lightning lets one process run this before all others go on, so these find the counts in the cache.
        self.source.index("train")
        self.source.index("val")

    def setup(self, stage: str | None = None) -> None:
        """Draw the episodes of a stage, "fit", "validate", "test" or "predict"; None is all of them."""
        network = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
        backbone: Any = getattr(network, "backbone", None)
        mean, std = self.mean or IMAGENET_MEAN, self.std or IMAGENET_STD
        if backbone is not None:
            mean, std = self.mean or backbone.mean, self.std or backbone.std
        self.augment = replace(self.augment, mean=tuple(mean), std=tuple(std))
        self.letterbox = replace(self.letterbox, mean=tuple(mean), std=tuple(std))
        if stage in ("fit", None):
            self.train_set = EpisodeDataset(
                self.source.index("train"),
                self.roles.train,
                self.shot,
                self.augment,
                seed=self.seed,
                min_pixels=self.source.min_pixels,
                novel_images=self.novel_images,
                hidden=self.roles.validation if self.selection == "base" else (),
            )
        if stage in ("fit", "validate", None):
            images = self.source.index("train" if self.selection == "base" else "val")
            self.val_set = self._fixed_episodes(images, self.roles.validation, length=self.val_episodes)
        if stage in ("test", "predict", None):
            images = self.source.index("val")
            listed = self._listed_episodes(images)
            self.test_set = self._fixed_episodes(
                images, self.roles.test, length=self.test_episodes, draws=listed
            )
            self.test_episodes = len(self.test_set)

    def train_dataloader(self) -> DataLoader:
        sampler = EpochSampler(len(self.train_set), self.seed, episodes=self.episodes_per_epoch)
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} is more than the {len(sampler)} training episodes of an epoch "
                "on one device, so no batch would be full; lower batch_size or raise episodes_per_epoch"
            )
        options = {"batch_size": self.batch_size, "drop_last": True, "done": partial(batches_done, self)}
        return self._loader(self.train_set, sampler, **options)

    def val_dataloader(self) -> DataLoader:
        return self._fixed_loader(self.val_set)

    def test_dataloader(self) -> DataLoader:
        return self._fixed_loader(self.test_set)

    predict_dataloader = test_dataloader

    def protocol(self) -> Protocol:
        """What the test was, once it is set up."""
        return Protocol(
            data=self.source.name,
            edition=self.source.edition,
            fold=self.fold,
            novel_classes=tuple(self.source.class_names[c - 1] for c in self.roles.test),
            shot=self.shot,
            novel_images=self.novel_images,
            selection=self.selection,
            image_size=self.letterbox.size,
            padding=self.letterbox.pad,
            multiple=self.letterbox.multiple,
            min_pixels=self.source.min_pixels,
            episodes=len(self.test_set),
            seeds=(self.episode_seed,),
            digests=(digest(self.test_set),),
        )

    def _listed_episodes(self, images: ImageIndex) -> list[Draw] | None:
        if self.episode_list is None:
            return None
        return read_episode_list(
            self.episode_list,
            images,
            self.roles.test,
            seed=self.episode_seed,
            edition=self.source.edition,
            fold=self.fold,
            shot=self.shot,
        )

    def _fixed_episodes(self, images: ImageIndex, classes: Sequence[int], **episodes: Any) -> EpisodeDataset:
        return EpisodeDataset(
            images,
            classes,
            self.shot,
            self.letterbox,
            seed=self.episode_seed,
            min_pixels=self.source.min_pixels,
            fixed=True,
            **episodes,
        )

    def _fixed_loader(self, dataset: EpisodeDataset) -> DataLoader:
        sampler = EpochSampler(len(dataset), self.seed, shuffle=False)
        return self._loader(dataset, sampler, batch_size=self.test_batch_size, collate_fn=collate)

    def _loader(self, dataset: EpisodeDataset, sampler: EpochSampler, **options: Any) -> DataLoader:
        # Nothing is seeded in the workers: episodes bring their own generators. Nor are their threads
        # limited here: torch gives a worker one.
        return EpochLoader(
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
    settings: Mapping[str, Any] | None,
) -> Any:
    """A transform from its settings, refusing unknown ones by the name of the argument they came in."""
    settings = settings or {}
    known = {field.name for field in fields(transform)} - {"size", "mean", "std"}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"{argument} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return transform(size, IMAGENET_MEAN, IMAGENET_STD, **settings)  # `setup` puts the backbone's own in
