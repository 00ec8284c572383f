"""Unpack the published archives of PASCAL and COCO into the folders that training reads.

The list of training images comes last; until then the data set counts as absent. Files of a folder are
linked, not copied, where the file system can.
"""

import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from svf_lightning.data.archives import _write, check_archive, unpack, writing
from svf_lightning.data.coco import ANNOTATIONS, Coco
from svf_lightning.data.episodes import class_lists
from svf_lightning.data.folds import FOLDS, PASCAL_CLASSES
from svf_lightning.data.pascal import IMAGES, LABELS, LISTS, TRAIN_LIST, VAL_LIST, Pascal
from svf_lightning.episode import IGNORE
from svf_lightning.files import replace_file

# Images in a fold's lists: training without images that show novel classes, training with them, test.
PASCAL_FOLD_IMAGES = ((4208, 4760, 364), (3726, 4588, 445), (2752, 4097, 592), (4510, 5108, 336))


COCO_IMAGES = {"2014": (82081, 40137), "2017": (117266, 4952)}  # with an object: training, test


class Count(NamedTuple):
    """A number of images, and the published one."""

    what: str
    found: int
    published: int

    def __str__(self) -> str:
        differs = "as published" if self.found == self.published else f"DIFFERS: published {self.published}"
        return f"{self.what}: {self.found} images, {differs}"


def prepare_pascal(voc: str | Path, sbd: str | Path, out: str | Path) -> list[Count]:
    """Make PASCAL-5i from VOC 2012 and SBD, in the layout that `Pascal` reads.

    Labels are VOC's own where VOC has one, with 255 along the outlines, and else SBD's class masks. The
    training list is VOC 2012 train and, behind it, those images of SBD that stand in VOC's Main/train.txt.
    Nothing of VOC 2012 val can be among them; should there be any, it is left out.

    Args:
        voc: VOCtrainval_11-May-2012.tar, or the folder VOCdevkit or VOC2012.
        sbd: benchmark.tgz of SBD, or a folder with its ``cls/*.mat``.
        out: The folder to make; its name under ``datasets`` is VOC2012.

    Returns:
        How many images there are, in all and for each fold, beside the published numbers.

    Raises:
        FileNotFoundError: If a source is missing.
        ValueError: If a source is damaged, is something else, may not be read, or ``out`` not be written; or
            if scipy is not installed, which reads SBD's files.
    """
    _require_scipy()
    voc, sbd, out = Path(voc), Path(sbd), Path(out)
    for source in (voc, sbd):
        check_archive(source)
    from_voc = {
        r"JPEGImages/[^/.]+\.jpg": IMAGES,
        r"SegmentationClass/[^/.]+\.png": LABELS,
        r"ImageSets/Segmentation/(train|val)\.txt": LISTS,
        r"ImageSets/Main/train\.txt": "ImageSets/Main",
    }
    expected = "VOCtrainval_11-May-2012.tar, or the folder VOC2012 in it"
    taken = unpack(voc, from_voc, out, expected=expected)
    own_labels = {Path(name).stem for name in taken if name.endswith(".png")}
    segmented = unpack(
        sbd,
        {r"cls/[^/.]+\.mat": LABELS},
        out,
        expected="benchmark.tgz of SBD, or the folder benchmark_RELEASE in it",
        convert=label_of_sbd,
        ending=".png",
        skip=own_labels,
    )
    train, val = (_read_ids(out / LISTS / f"{split}.txt") for split in ("train", "val"))
    main_train = _read_ids(out / "ImageSets/Main/train.txt")
    additional = {Path(name).stem for name in segmented} & set(main_train)
    merged = [*train, *(i for i in main_train if i in additional - set(train))]
    merged = [image_id for image_id in merged if image_id not in set(val)]

    for image_id in (*merged, *val):
        for path in (out / IMAGES / f"{image_id}.jpg", out / LABELS / f"{image_id}.png"):
            if not path.is_file():
                raise ValueError(
                    f"{voc} lists {image_id} but lacks its {path.parent.name}/{path.name}: is it cut short? "
                    "Fetch it again and repeat the command; what is unpacked stays"
                )
    lines = "".join(f"{IMAGES}/{i}.jpg {LABELS}/{i}.png\n" for i in merged)
    with writing(out):
        replace_file(out / TRAIN_LIST, partial(_write, lines.encode()))
    return [
        Count("VOC 2012 train", len(train), 1464),
        Count("SBD in VOC's Main/train.txt", len(additional), 5623),
        Count("training list, both without duplicates", len(merged), 5953),
        Count(f"test list, {VAL_LIST}", len(val), 1449),
        *_count_folds(Pascal(out)),
    ]


def prepare_coco(
    images: Sequence[str | Path], annotations: Sequence[str | Path], out: str | Path, year: str = "2014"
) -> list[Count]:
    """Make COCO-20i from the official archives, in the layout that `Coco` reads, and draw its labels.

    Args:
        images: train<year>.zip and val<year>.zip, or folders of these names, or one that holds both.
        annotations: annotations_trainval<year>.zip, its folder, or the two instances files.
        out: The folder to make; its name under ``datasets`` is coco.
        year: "2014" or "2017".

    Returns:
        How many images with objects there are, beside the published numbers.

    Raises:
        FileNotFoundError: If a source is missing, or images that the annotations name.
        ValueError: If a source is damaged, is something else, may not be read, or ``out`` not be written.
    """
    out, source = Path(out), Coco(out, year)
    for path in (*images, *annotations):
        check_archive(Path(path))
    for path in annotations:
        wanted = {rf"instances_(train|val){year}\.json": ANNOTATIONS}
        unpack(Path(path), wanted, out, expected=f"annotations_trainval{year}.zip, or instances_*{year}.json")
    for path in images:
        wanted = {rf"{name}/[^/.]+\.jpg": name for name in (f"train{year}", f"val{year}")}
        unpack(
            Path(path), wanted, out, expected=f"train{year}.zip or val{year}.zip, or a folder of that name"
        )
    source.prepare()
    return [
        Count(f"{split}{year} with objects", len(source.index(split)), published)  # type: ignore[arg-type]
        for split, published in zip(("train", "val"), COCO_IMAGES[year], strict=True)
    ]


def label_of_sbd(content: bytes) -> bytes:
    """A PNG of class ids from a class mask of SBD, a MATLAB file with ``GTcls.Segmentation``.

    Raises:
        ValueError: If it is damaged or something else.
    """
    from scipy.io import loadmat

    try:
        label = np.asarray(loadmat(io.BytesIO(content))["GTcls"][0, 0]["Segmentation"])
    except Exception as error:  # scipy raises a dozen kinds for a broken file
        raise ValueError(f"no class mask of SBD ({error or type(error).__name__})") from None
    if label.ndim != 2 or label.dtype != np.uint8 or not set(np.unique(label)) <= _CLASS_IDS:
        raise ValueError(f"its Segmentation is no map of the ids 0..{len(PASCAL_CLASSES)} and {IGNORE}")
    png = io.BytesIO()
    Image.fromarray(label).save(png, "PNG")
    return png.getvalue()


_CLASS_IDS = {*range(len(PASCAL_CLASSES) + 1), IGNORE}


def _require_scipy() -> None:
    try:
        import scipy.io  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError(
            "SBD's labels are MATLAB files, and scipy, which reads them, is not installed: "
            "`pip install 'svf-lightning[prepare]'`"
        ) from None


def _count_folds(source: Pascal) -> list[Count]:
    """Images in the lists of each fold, for training with and without the training trick, and for test."""
    train, val = source.index("train").pixels, source.index("val").pixels
    counts = []
    for fold, published in zip(range(FOLDS), PASCAL_FOLD_IMAGES, strict=True):
        base, novel = source.classes(fold)
        lists = (
            ("training, novel_images=drop", train, base, "drop"),
            ("training, novel_images=background", train, base, "background"),
            ("test", val, novel, "background"),
        )
        for (what, pixels, classes, rule), number in zip(lists, published, strict=True):
            listed = class_lists(pixels, classes, min_pixels=source.min_pixels, novel_images=rule)  # type: ignore[arg-type]
            counts.append(Count(f"fold {fold}, {what}", int(listed.any(axis=1).sum()), number))
    return counts


def _read_ids(path: Path) -> list[str]:
    if not path.is_file():
        name = path.relative_to(path.parents[2])
        raise ValueError(f"there is no {name} in the VOC source: use VOCtrainval_11-May-2012.tar, all of it")
    return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
