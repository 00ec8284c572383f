"""PASCAL-5i: VOC 2012 with the additional annotations of SBD, and the reader of the VOC folder layout."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from svf_lightning.data.folds import PASCAL_CLASSES, split_classes
from svf_lightning.data.index import build_index
from svf_lightning.data.source import ImageIndex, Split
from svf_lightning.errors import DataError, MissingFileError

IMAGES = "JPEGImages"
LABELS = "SegmentationClassAug"
LISTS = "ImageSets/Segmentation"

TRAIN_LIST = f"{LISTS}/voc_sbd_merge_noduplicate.txt"
VAL_LIST = f"{LISTS}/val.txt"


@dataclass(frozen=True)
class Pascal:
    """PASCAL-5i in the VOC folder layout.

    ========  ==========================================================================================
    images    JPEG, RGB, no side longer than 500 pixels, most of them 500x375 or 375x500
    labels    8-bit PNG of the image's size, one class id per pixel, greyscale or with a colour palette;
              0 background, 1..20 the classes of `PASCAL_CLASSES`, 255 ignored (the line around objects)
    train     5953 images: VOC 2012 train (1464) and those of SBD that are not in VOC 2012 val, once each.
              This is the list of PFENet and its successors, not the 10582 images of "trainaug"
    val       1449 images: VOC 2012 val
    folds     4; fold f tests the five classes 5f+1 .. 5f+5
    ========  ==========================================================================================

    Under ``root`` (the folder called ``VOC2012`` inside ``VOCdevkit``) lie::

        JPEGImages/2007_000032.jpg
        SegmentationClassAug/2007_000032.png
        ImageSets/Segmentation/voc_sbd_merge_noduplicate.txt
        ImageSets/Segmentation/val.txt

    A line of a list is either an image's id, or the paths of an image and its label relative to ``root``.

    Args:
        root: The folder above.
        train_list: Another list of training images, relative to ``root``.
        val_list: Another list of test images, relative to ``root``.
        min_pixels: Pixels of a class that an image must show to count as one of that class:
            2 * 32 * 32, of the original image, in the code of PFENet and all that follow it.

    Source:
        Everingham et al., The Pascal Visual Object Classes Challenge: A Retrospective, IJCV 111, 2015.
        Hariharan et al., Semantic Contours from Inverse Detectors, ICCV 2011 (SBD).
        Shaban et al., One-Shot Learning for Semantic Segmentation, BMVC 2017 (the folds).
    """

    root: str | Path
    train_list: str = TRAIN_LIST
    val_list: str = VAL_LIST
    min_pixels: int = 2 * 32 * 32
    name: str = field(default="pascal", init=False)
    class_names: tuple[str, ...] = field(default=PASCAL_CLASSES, init=False, repr=False)

    @property
    def edition(self) -> str:
        """How the folds are cut; and the lists, where they are not the usual ones."""
        own = [name for name in (self.train_list, self.val_list) if name not in (TRAIN_LIST, VAL_LIST)]
        return ", ".join(["contiguous folds", *own])

    def ensure(self) -> None:
        """Check that folders and lists are there.

        Raises:
            FileNotFoundError: Says what was looked for, where, and what to fetch.
        """
        root = Path(self.root)
        wanted = (IMAGES, LABELS, self.train_list, self.val_list)
        missing = [name for name in wanted if not (root / name).exists()]
        if not missing:
            return
        inside = [path for path in (root / "VOCdevkit/VOC2012", root / "VOC2012") if (path / IMAGES).is_dir()]
        if inside:
            message = f"root is {root}, but the data lies deeper: use root={inside[0]}"
            raise MissingFileError.of(root, "holds the data deeper", f"use root={inside[0]}", message)
        remedy = (
            "Fetch VOCtrainval_11-May-2012.tar of VOC 2012 and benchmark.tgz of SBD (Hariharan et al.), then "
            "run `svf prepare pascal --voc VOCtrainval_11-May-2012.tar --sbd benchmark.tgz --out "
            f"{root}`; folders will do for archives"
        )
        message = f"no {', '.join(missing)} under root={root}. {remedy}"
        raise MissingFileError.of(root, f"holds no {', '.join(missing)}", remedy, message)

    def index(self, split: Split) -> ImageIndex:
        """Index the training or the test images.

        Raises:
            FileNotFoundError: If the list or a file on it is missing.
            ValueError: If the list or a file on it is bad, or ``split`` is neither "train" nor "val".
        """
        if split not in ("train", "val"):
            raise ValueError(f'split is {split!r}; a data set has "train" and "val"')
        image_list = self.train_list if split == "train" else self.val_list
        pairs = read_image_list(self.root, image_list)
        cache = Path(self.root) / f"index_{split}_{Path(image_list).stem}.npz"
        return build_index(self.name, self.class_names, pairs, cache=cache)

    def classes(self, fold: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Base and novel class ids of a fold."""
        return split_classes(self.name, fold)


def read_image_list(root: str | Path, image_list: str | Path) -> list[tuple[Path, Path]]:
    """Image and label paths that a list in the VOC folder layout names.

    Two kinds of lines, and blank ones, which are skipped::

        2007_000032
        JPEGImages/2007_000032.jpg SegmentationClassAug/2007_000032.png

    Args:
        root: The folder that paths are relative to.
        image_list: The list, relative to ``root``.

    Raises:
        FileNotFoundError: If there is no such list.
        ValueError: If a line is of neither kind, an image is listed twice, or none is.
    """
    root, path = Path(root), Path(root) / image_list
    if not path.is_file():
        remedy = "check root, or name the list by its path from there"
        message = f"no list {image_list} under root={root}: {remedy}"
        raise MissingFileError.of(root, f"holds no list {image_list}", remedy, message)
    pairs: list[tuple[Path, Path]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        match line.split():
            case []:
                continue
            case [image_id]:
                pairs.append((root / IMAGES / f"{image_id}.jpg", root / LABELS / f"{image_id}.png"))
            case [image, label]:
                pairs.append((root / image, root / label))
            case words:
                found = f"has {len(words)} words in line {number}"
                remedy = "a line is an image id, or an image path and a label path (without spaces in them)"
                message = f"{path}, line {number}: {len(words)} words, but {remedy.replace(',', '', 1)}"
                raise DataError.of(path, found, remedy, message)
    _check_list(path, pairs)
    return pairs


def _check_list(path: Path, pairs: Sequence[tuple[Path, Path]]) -> None:
    if not pairs:
        raise DataError.of(path, "lists no images", "fetch it again, or name another list")
    seen: set[Path] = set()
    for image, _ in pairs:
        if image in seen:  # its copy could become its own support
            raise DataError.of(path, f"lists {image.name} twice", "remove one of the lines")
        seen.add(image)


@cache
def voc_palette() -> bytes:
    """The colours that VOC shows its class ids in: 256 times red, green, blue.

    Bits 0, 3 and 6 of an id are the top three bits of red (lowest first), bits 1, 4 and 7 of green,
    bits 2 and 5 of blue.

    Example:
        >>> tuple(voc_palette()[3:6]), tuple(voc_palette()[-3:])  # aeroplane, and the ignore label
        ((128, 0, 0), (224, 224, 192))
    """

    def level(class_id: int, channel: int) -> int:
        bits = ((class_id >> (3 * step + channel)) & 1 for step in range(3))
        return sum(bit << (7 - step) for step, bit in enumerate(bits))

    return bytes(level(class_id, channel) for class_id in range(256) for channel in range(3))
