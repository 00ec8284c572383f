"""Your own images: pictures and masks as they lie in a folder, in one of three layouts.

``svf check DIR`` shows what this file makes of a folder, and everything that is wrong with it.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from svf_lightning.data.coco import draw_label
from svf_lightning.data.folder_files import Item, Listing, read_text, same_name
from svf_lightning.data.folder_layouts import list_folder
from svf_lightning.data.folds import FOLDS, split_own_classes
from svf_lightning.data.images import open_image, to_rgb, to_tensor
from svf_lightning.data.index import load_counts, save_counts, state_of_files
from svf_lightning.data.masks import align, class_ids, displayed, drawn_mask, shrink
from svf_lightning.data.source import ImageIndex, Split
from svf_lightning.episode import FOREGROUND, IGNORE
from svf_lightning.errors import DataError, Problem, problems_of
from svf_lightning.progress import track

log = logging.getLogger(__name__)

CACHE = ".svf_index.npz"
MOVING = (".gif", ".webp", ".tif", ".tiff", ".avif")  # endings of files that may hold several pictures


@dataclass(frozen=True)
class Folder:
    """The user's own data, read where it lies.

    =========  =========================================================================================
    folders    ``images/<class>/x.jpg`` and ``masks/<class>/x.png``, with any folders in between. A mask
               shows one class, in any of the ways of `drawn_mask`; ``x_mask.png`` and ``x.jpg.png`` are
               found too. A picture of two classes may lie in both folders, each time with one mask
    indexed    ``images/x.jpg``, ``masks/x.png`` with a class id per pixel (0 background, 255 ignored) and
               ``classes.txt``, line n naming class n (a first line "background" is skipped; lines may
               begin with their number instead). With a single class, masks may be those of "folders"
    coco       ``annotations.json`` in COCO's format: polygons or run lengths; smaller objects lie on top;
               crowds are ignored. Pictures lie in ``images/`` or beside the file
    images     whatever Pillow reads; 16 bits are scaled; turned by the EXIF tag where the mask is
    ids        ``<class>/x`` or ``x``, in every alphabet; hidden files are passed over
    =========  =========================================================================================

    **Which images train, which test.** A small collection has none to spare, so by default the classes alone
    make the split: test episodes take all images that show a novel class, and training the others (the data
    module's ``novel_images="drop"``; with "background" it would learn from test images). ``val_list`` names
    test images instead, and all others train.

    Sizes differ among photographs, so the least size of an object is a share of its picture: the pixel counts
    of the index are scaled to the collection's median picture.

    Args:
        root: The folder.
        novel: Names of the classes to test; None makes folds.
        folds: Number of folds of neighbouring classes; None takes four, or one per class if there are fewer.
        layout: "folders", "indexed" or "coco"; "auto" finds out.
        min_share: Share of a picture, in [0, 1), that a class must fill to count as shown. The default is
            an 8x8 patch in a picture of 257x257.
        val_list: A text file, relative to ``root``, with the id or the file of one test image per line.
        long_side: Longer pictures are read shrunk to this many pixels, and evaluated so; None reads all.
        skip_bad: Go on without the files that cannot be used, with a warning that names them; otherwise
            they are refused.

    Raises:
        ValueError: If a number is out of range.
    """

    root: str | Path | None
    novel: Sequence[str] | str | None = None
    folds: int | None = None
    layout: str = "auto"
    min_share: float = 0.001
    val_list: str | None = None
    long_side: int | None = 1024
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.root is None or str(self.root) == "":
            raise ValueError("root is not set: name the folder of your images, data.root=my_photos")
        if not 0 <= self.min_share < 1:
            raise ValueError(f"min_share is {self.min_share!r}; it is a share of the picture, 0 to 1")
        if self.long_side is not None and (type(self.long_side) is not int or self.long_side < 32):
            raise ValueError(f"long_side is {self.long_side!r}; use 32 pixels or more, or null for no limit")

    @property
    def name(self) -> str:
        return Path(str(self.root)).absolute().name

    @property
    def edition(self) -> str:
        """How the novel classes and the test images are chosen."""
        if self.novel is None:
            rule = f"{self.folds or min(FOLDS, len(self.class_names))} folds"
        else:
            names = [self.novel] if isinstance(self.novel, str) else self.novel
            rule = f"novel {', '.join(names)}"
        return rule if self.val_list is None else f"{rule}, test images of {self.val_list}"

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.listing.class_names

    @property
    def min_pixels(self) -> int:
        """Pixels of a class that an image must show, at the size of the median image."""
        return max(1, round(self.min_share * self._median_area))

    @cached_property
    def listing(self) -> Listing:
        """What lies under ``root``.

        Raises:
            FileNotFoundError: If there is no such folder, or no layout fits.
            ValueError: If the files that describe it cannot be read.
        """
        return list_folder(str(self.root), self.layout)

    def ensure(self) -> None:
        """Look through the folder.

        Raises:
            FileNotFoundError: If it is missing, or no layout fits.
            ValueError: If files have no partner and ``skip_bad`` is off.
        """
        self._refuse(self.listing.problems)

    def index(self, split: Split) -> ImageIndex:
        """Index the images that may train, or those that may test.

        Raises:
            FileNotFoundError: If the folder or ``val_list`` is missing.
            ValueError: If files cannot be used and ``skip_bad`` is off, or ``split`` is neither "train" nor
                "val".
        """
        if split not in ("train", "val"):
            raise ValueError(f'split is {split!r}; a data set has "train" and "val"')
        items, pixels = self._counted
        if self.val_list is not None:
            chosen = self._is_listed(items) == (split == "val")
            items, pixels = [item for item, take in zip(items, chosen, strict=True) if take], pixels[chosen]
        # Scaled to the median picture and rounded up: what shows one pixel of a class still does.
        areas = np.maximum(pixels.sum(axis=1, keepdims=True), 1)
        return ImageIndex(
            name=self.name,
            class_names=self.class_names,
            ids=tuple(item.id for item in items),
            pixels=np.ceil(pixels * (self._median_area / areas)).astype(np.int64),
            read=partial(_read, tuple(items), len(self.class_names), self.long_side),
        )

    def classes(self, fold: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Base and novel class ids of a fold."""
        novel = [self.novel] if isinstance(self.novel, str) else self.novel
        return split_own_classes(self.class_names, fold, novel=novel, folds=self.folds)

    @cached_property
    def _counted(self) -> tuple[list[Item], np.ndarray]:
        """The usable items, and their pixels of each class, shape ``(images, N + 1)``."""
        listing, root = self.listing, Path(str(self.root))
        self._refuse(listing.problems)
        others = [(str(path), str(path)) for path in listing.sources]
        paths = [(str(item.image), str(item.mask or item.image)) for item in listing.items]
        key = state_of_files(f"folder {listing.layout}", len(listing.class_names), (*others, *paths), root)
        pixels = load_counts(root / CACHE, key, (len(paths), len(listing.class_names) + 1))
        if pixels is not None:
            return list(listing.items), pixels
        results = list(examine(listing))
        self._refuse(problem for result in results for problem in result.problems)
        good = [(result.item, result.counts) for result in results if result.counts is not None]
        if not good:
            raise ValueError(
                f"{root}: none of {len(results)} images can be used; `svf check {root}` says why"
            )
        pixels = np.stack([counts for _, counts in good])
        if len(good) == len(results):
            save_counts(root / CACHE, key, pixels)
        return [item for item, _ in good], pixels

    @cached_property
    def _median_area(self) -> float:
        return float(np.median(self._counted[1].sum(axis=1)))

    def _refuse(self, problems: Iterable[Problem]) -> None:
        errors = [problem for problem in problems if problem.severity == "error"]
        if not errors:
            return
        shown = " | ".join(map(str, errors[:5]))
        shown += f" | and {len(errors) - 5} more" if len(errors) > 5 else ""
        if not self.skip_bad:
            message = (
                f"{self.root}: {len(errors)} files cannot be used: {shown}. `svf check {self.root}` lists "
                "all, with what to do; data.source.skip_bad=true goes on without them"
            )
            raise DataError(message, errors)
        log.warning("%s: going on without %d files: %s", self.root, len(errors), shown)

    def _is_listed(self, items: Sequence[Item]) -> np.ndarray:
        """Whether ``val_list`` names each item, shape ``(images,)``."""
        path = Path(str(self.root)) / str(self.val_list)
        if not path.is_file():
            raise FileNotFoundError(f"val_list={self.val_list} is no file under {self.root}; check its name")
        lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        wanted = {same_name(line) for line in lines}
        names = [
            {
                same_name(item.id),
                same_name(item.image.relative_to(Path(str(self.root))).as_posix()),
                same_name(item.image.name),
            }
            for item in items
        ]
        if unknown := [line for line in lines if not any(same_name(line) in known for known in names)]:
            raise ValueError(
                f"{path} names {unknown[0]!r}, which is no image here (and {len(unknown) - 1} more): write "
                f"names like {items[0].id!r}"
            )
        return np.array([bool(wanted & known) for known in names])


class Examined(NamedTuple):
    """What one picture and its label turned out to be."""

    item: Item
    size: tuple[int, int] | None  # width and height; None if it cannot be used
    counts: np.ndarray | None  # (N + 1,) int64, pixels of each class; likewise
    problems: tuple[Problem, ...]


def examine(listing: Listing) -> Iterator[Examined]:
    """Open every picture and mask, in order; nothing that is wrong with one stops the others."""
    count = partial(_examine_one, len(listing.class_names))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        try:
            done = pool.map(count, listing.items)
            yield from track(done, "reading images and masks", len(listing.items), "images")
        except BaseException:  # Ctrl-C: do not go on to decode those still waiting
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def read_item(item: Item, classes: int, long_side: int | None = None) -> tuple[Image.Image, np.ndarray]:
    """One picture and its label, the same way round.

    Args:
        item: From a `Listing` of ``classes`` classes.
        classes: Number of classes.
        long_side: See `Folder`.

    Returns:
        RGB image, and class ids ``(H, W)`` uint8 with 255 where ignored.

    Raises:
        MissingFileError: If one of the files is gone.
        DataError: If one cannot be read, or they do not fit each other.
    """
    image, culprit = open_image(item.image), item.mask or item.image
    mask = open_image(item.mask) if item.mask is not None else None
    try:
        if mask is None:
            image = _of_size(image, item.size)
            label = draw_label(item.objects, image.height, image.width)
        else:
            image, mask = align(image, mask)
            if item.class_id or classes == 1:
                label = drawn_mask(mask)
                label[label == FOREGROUND] = item.class_id or 1
            else:
                label = class_ids(mask)
        return shrink(to_rgb(image), label, long_side)
    except DataError as error:  # of the mask or its outlines: say which file that is
        (problem,) = error.problems
        message = f"{culprit}: {problem.found}: {problem.remedy}"
        raise DataError.of(culprit, problem.found, problem.remedy, message) from error


def _read(items: Sequence[Item], classes: int, long_side: int | None, position: int) -> tuple[Tensor, Tensor]:
    image, label = read_item(items[position], classes, long_side)
    return to_tensor(image), torch.from_numpy(label)


def _examine_one(classes: int, item: Item) -> Examined:
    try:
        image, label = read_item(item, classes)
    except (ValueError, OSError) as error:
        problems = problems_of(error, item.mask or item.image, "replace or mend it")
        return Examined(item, None, None, problems)
    histogram = np.bincount(label.reshape(-1), minlength=256)
    wrong = _wrong_label(item, histogram, classes)
    if wrong:
        return Examined(item, None, None, (Problem(str(item.mask or item.image), *wrong),))
    notes = []
    shown = histogram[1 : classes + 1].sum() / label.size
    if not shown:
        notes.append((item.mask or item.image, "shows no class", "no episode will use it; that may be meant"))
    elif item.class_id and shown > 0.95:
        remedy = "if it is inverted, make the object white"
        notes.append((item.mask or item.image, f"covers {100 * shown:.0f}% of its picture", remedy))
    if item.image.suffix.lower() in MOVING:
        with Image.open(item.image) as opened:
            frames = getattr(opened, "n_frames", 1)
        if frames > 1:
            notes.append(
                (item.image, f"has {frames} frames, of which the first is used", "save the others apart")
            )
    if float(np.asarray(image.convert("L")).std()) < 1:
        notes.append((item.image, "shows a single colour", "look at it: is it the right file?"))
    problems = tuple(Problem(str(file), found, remedy, "warning") for file, found, remedy in notes)
    return Examined(item, image.size, histogram[: classes + 1].astype(np.int64), problems)


def _wrong_label(item: Item, histogram: np.ndarray, classes: int) -> tuple[str, str] | None:
    """What is wrong with a label of these counts ``(256,)``, if anything, and what to do."""
    unknown = [int(i) for i in np.flatnonzero(histogram[:IGNORE]) if i > classes]
    if unknown:
        found = f"holds the ids {', '.join(map(str, unknown[:10]))}, but classes.txt names 1 to {classes}"
        if item.mask is not None and item.mask.suffix.lower() in (".jpg", ".jpeg"):
            return found, "save it as PNG: JPEG blurs ids into other ids"
        return found, "renumber it, or add the missing names to classes.txt"
    if histogram[1 : classes + 1].any():
        return None
    if item.class_id:
        return "is empty: it marks no pixel", "draw the object white on black, or delete image and mask"
    if item.mask is not None and histogram[IGNORE] > 0.01 * histogram.sum():
        return "holds only 0 and 255, and 255 is ignored", "write the class ids of classes.txt into it"
    return None


def _of_size(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """The image the way round that the annotations were made on."""
    for turned in (displayed(image), image):
        if size is None or turned.size == size:
            return turned
    (width, height), (wanted_width, wanted_height) = displayed(image).size, size or (0, 0)
    found = f"is {width}x{height} but was annotated at {wanted_width}x{wanted_height} (width x height)"
    raise DataError.of("the image", found, "put the annotated version back")
