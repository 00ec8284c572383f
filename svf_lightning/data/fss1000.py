"""FSS-1000: a thousand classes of ten images each, with published lists of classes instead of folds."""

import os
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from svf_lightning.data.folds import check_fold
from svf_lightning.data.images import open_image, read_image
from svf_lightning.data.index import build_index
from svf_lightning.data.source import ImageIndex, Split
from svf_lightning.episode import IGNORE
from svf_lightning.errors import DataError, MissingFileError

IMAGES_PER_CLASS = 10
LISTS = ("trn", "val", "test")  # of classes, as HSNet calls them
FETCH = (
    "fetch fewshot_data.zip of FSS-1000 (HKUSTCV/FSS-1000 on GitHub says where) and unpack it, so that root "
    "holds a folder for every class"
)


@dataclass(frozen=True)
class Fss1000:
    """FSS-1000 with the class lists that HSNet uses.

    ========  ==========================================================================================
    images    10000, JPEG, RGB, 224x224; ten of each class, each with one object of the class
    masks     PNG of the image's size; the object is where the grey value is 128 or more. Nothing is ignored
    classes   1000: 520 to train, 240 to validate, 240 to test. There are no folds, so ``fold`` is 0
    ========  ==========================================================================================

    Under ``root`` lie a folder for every class and the lists, one class a line::

        abacus/1.jpg
        abacus/1.png
        splits/fss/trn.txt
        splits/fss/val.txt
        splits/fss/test.txt

    Ids are given in alphabetical order of all listed classes, leaving out 255, which in labels means
    "ignored": they end at 1001, and ``class_names[254]`` is empty.

    Both splits are made of all images, as an image shows one class, base or novel. The first image of every
    class comes first, then the second ones: so a test of 240 episodes meets every test class once.

    Args:
        root: The folder above.
        novel: Which list the episodes of validation and test are drawn from: ``"test"``, or ``"val"`` to
            choose settings without looking at the test classes.
        splits: Where the lists are, relative to ``root``.
        min_pixels: Pixels of its class that an image must show to be used; 1 leaves out empty masks.

    Raises:
        ValueError: If ``novel`` is neither of the two.

    Source:
        Li et al., FSS-1000: A 1000-Class Dataset for Few-Shot Segmentation, CVPR 2020.
        Min et al., Hypercorrelation Squeeze for Few-Shot Segmentation, ICCV 2021 (lists and threshold).
    """

    root: str | Path
    novel: Literal["test", "val"] = "test"
    splits: str = "splits/fss"
    min_pixels: int = 1
    name: str = field(default="fss1000", init=False)

    def __post_init__(self) -> None:
        if self.novel not in ("test", "val"):
            raise ValueError(f"novel is {self.novel!r}; FSS-1000 has test and val classes")

    @property
    def edition(self) -> str:
        """Whose classes are novel."""
        return f"classes of {self.novel}.txt"

    @cached_property
    def _lists(self) -> dict[str, tuple[str, ...]]:
        """The classes of each list."""
        root, folder = Path(self.root), Path(self.root) / self.splits
        inside = root / "fewshot_data"  # what the archive unpacks to
        if inside.is_dir() and not folder.is_dir():
            message = f"root is {root}, but the data lies deeper: use root={inside}"
            raise MissingFileError.of(root, "holds the data deeper", f"use root={inside}", message)
        missing = [f"{name}.txt" for name in LISTS if not (folder / f"{name}.txt").is_file()]
        if missing:
            remedy = (
                "fetch the lists of classes from the repository of HSNet (juhongm999/hsnet, data/splits/fss: "
                "trn.txt, val.txt, test.txt)" + ("" if root.is_dir() else f", and {FETCH}")
            )
            message = f"no {', '.join(missing)} in {folder}: {remedy}"
            raise MissingFileError.of(folder, f"holds no {', '.join(missing)}", remedy, message)
        lists = {name: _read_classes(folder / f"{name}.txt") for name in LISTS}
        listed: dict[str, str] = {}
        for name, classes in lists.items():
            for title in classes:
                if title in listed:
                    found = f"{title} stands in {listed[title]}.txt and in {name}.txt"
                    remedy = "base and novel classes must differ: fetch the lists again"
                    raise DataError.of(folder, found, remedy, f"{folder}: {found}; {remedy}")
                listed[title] = name
        return lists

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Name of class id c at position c - 1; that of id 255, which no class has, is empty.

        Raises:
            FileNotFoundError: If a list is missing.
            ValueError: If lists are empty or share a class.
        """
        names = sorted(title for classes in self._lists.values() for title in classes)
        return (*names[: IGNORE - 1], "", *names[IGNORE - 1 :]) if len(names) >= IGNORE else tuple(names)

    def ensure(self) -> None:
        """Check that lists and folders are there.

        Raises:
            FileNotFoundError: Says what was looked for, where, and what to fetch.
            ValueError: If lists are empty or share a class.
        """
        root = Path(self.root)
        names = [name for name in self.class_names if name]  # also checks the lists
        present = {entry.name for entry in os.scandir(root) if entry.is_dir()}
        absent = [name for name in names if name not in present]
        if absent:
            found = f"lacks the folders of {len(absent)} of {len(names)} classes, {absent[0]} for one"
            raise MissingFileError.of(root, found, FETCH, f"root={root} {found}: {FETCH}")

    def index(self, split: Split) -> ImageIndex:
        """Index all images; both splits are the same.

        Raises:
            FileNotFoundError: If lists, folders or files are missing.
            ValueError: If a file is bad, or ``split`` is neither "train" nor "val".
        """
        if split not in ("train", "val"):
            raise ValueError(f'split is {split!r}; a data set has "train" and "val"')
        root = Path(self.root)
        files = [
            (class_id, root / name / f"{number}")
            for number in range(1, IMAGES_PER_CLASS + 1)
            for class_id, name in enumerate(self.class_names, start=1)
            if name
        ]
        pairs = [(f"{stem}.jpg", f"{stem}.png") for _, stem in files]
        ids = [f"{stem.parent.name}/{stem.name}" for _, stem in files]
        masks = build_index(
            self.name, ("object",), pairs, cache=root / "index.npz", ids=ids, decode=decode_mask
        )
        class_ids = np.array([class_id for class_id, _ in files])
        pixels = np.zeros((len(files), len(self.class_names) + 1), np.int64)
        pixels[:, 0] = masks.pixels[:, 0]
        pixels[np.arange(len(files)), class_ids] = masks.pixels[:, 1]
        return ImageIndex(self.name, self.class_names, masks.ids, pixels, partial(_read, pairs, class_ids))

    def classes(self, fold: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Base and novel class ids.

        Raises:
            FileNotFoundError: If a list is missing.
            ValueError: If ``fold`` is not 0.
        """
        check_fold(self.name, fold, 1)
        ids = {name: class_id for class_id, name in enumerate(self.class_names, start=1)}
        base, novel = (tuple(sorted(ids[name] for name in self._lists[key])) for key in ("trn", self.novel))
        return base, novel


def decode_mask(path: str | Path) -> np.ndarray:
    """A mask of FSS-1000: 1 where it is grey 128 or brighter, else 0; uint8, shape ``(H, W)``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no image, or cut short.
    """
    return (np.asarray(open_image(path).convert("L")) >= 128).astype(np.uint8)


def _read(pairs: list[tuple[str, str]], class_ids: np.ndarray, position: int) -> tuple[Tensor, Tensor]:
    image, mask = pairs[position]
    # 16 bits: ids go up to 1001
    label = decode_mask(mask).astype(np.int16) * np.int16(class_ids[position])
    return read_image(image), torch.from_numpy(label)


def _read_classes(path: Path) -> tuple[str, ...]:
    classes = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not classes:
        raise DataError.of(path, "lists no classes", "fetch it again")
    return classes
