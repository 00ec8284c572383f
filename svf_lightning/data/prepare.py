"""From the archives that data sets are published as to the folders that training reads.

Sources are archives (tar, compressed or not, and zip) or the folders they unpack to. Every file is written
under another name and then renamed, and one that is there with its full size is not written again: so an
interrupted start goes on where it stopped. The list of training images comes last; until then the data set
counts as absent. Files of a folder are linked, not copied, where the file system can.

Nothing is put where an archive says. Only file names that are looked for are taken, and only the last part
of their path; so an archive cannot write outside of the folder it is unpacked to.
"""

import hashlib
import io
import lzma
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from svf_lightning.data.coco import ANNOTATIONS, Coco
from svf_lightning.data.episodes import class_lists
from svf_lightning.data.folds import FOLDS, PASCAL_CLASSES
from svf_lightning.data.pascal import IMAGES, LABELS, LISTS, TRAIN_LIST, VAL_LIST, Pascal
from svf_lightning.episode import IGNORE
from svf_lightning.errors import DataError, Problem
from svf_lightning.files import replace_file, write_whole
from svf_lightning.progress import Progress, track

MEGABYTE = 2**20

# Tars have no checksums of what is in them; files of a zip have, and `zipfile` compares them.
MD5 = {
    "VOCtrainval_11-May-2012.tar": "6cd6e144f989b92b3379bac3b3de84fd",
    "benchmark.tgz": "82b4d87ceb2ed10f6038a1cba92111cb",
}

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


class Member(NamedTuple):
    """A file of an archive or folder."""

    name: str  # with folders, separated by /
    size: int  # in bytes
    read: Callable[[], bytes]
    path: Path | None  # where it lies, if not in an archive


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
        _check_archive(source)
    from_voc = {
        r"JPEGImages/[^/.]+\.jpg": IMAGES,
        r"SegmentationClass/[^/.]+\.png": LABELS,
        r"ImageSets/Segmentation/(train|val)\.txt": LISTS,
        r"ImageSets/Main/train\.txt": "ImageSets/Main",
    }
    taken = _unpack(voc, from_voc, out, expected="VOCtrainval_11-May-2012.tar, or the folder VOC2012 in it")
    own_labels = {Path(name).stem for name in taken if name.endswith(".png")}
    segmented = _unpack(
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
    with _writing(out):
        write_whole(out / TRAIN_LIST, "".join(f"{IMAGES}/{i}.jpg {LABELS}/{i}.png\n" for i in merged))
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
        _check_archive(Path(path))
    for path in annotations:
        wanted = {rf"instances_(train|val){year}\.json": ANNOTATIONS}
        expected = f"annotations_trainval{year}.zip, or instances_*{year}.json"
        _unpack(Path(path), wanted, out, expected=expected)
    for path in images:
        wanted = {rf"{name}/[^/.]+\.jpg": name for name in (f"train{year}", f"val{year}")}
        expected = f"train{year}.zip or val{year}.zip, or a folder of that name"
        _unpack(Path(path), wanted, out, expected=expected)
    source.ensure()
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
    ids = {*range(len(PASCAL_CLASSES) + 1), IGNORE}
    if label.ndim != 2 or label.dtype != np.uint8 or not set(np.unique(label)) <= ids:
        raise ValueError(f"its Segmentation is no map of the ids 0..{len(PASCAL_CLASSES)} and {IGNORE}")
    png = io.BytesIO()
    Image.fromarray(label).save(png, "PNG")
    return png.getvalue()


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


def _check_archive(source: Path) -> None:
    """Refuse a source that is not there, and an archive of a known name that is not the published one."""
    if not source.exists():
        raise FileNotFoundError(f"{source} is missing: give the archive, or the folder that it unpacks to")
    if source.name not in MD5 or source.is_dir():
        return
    digest = hashlib.md5(usedforsecurity=False)
    with _reading(source), source.open("rb") as file:
        blocks = iter(lambda: file.read(MEGABYTE), b"")
        for block in track(blocks, f"checking {source.name}", source.stat().st_size // MEGABYTE, "MB"):
            digest.update(block)
    if digest.hexdigest() != MD5[source.name]:
        found = f"is not the published file (MD5 {digest.hexdigest()} instead of {MD5[source.name]})"
        remedy = "fetch it again; or, to use it as it is, unpack it and give the folder"
        raise DataError.of(source, found, remedy)


def _unpack(
    source: Path,
    wanted: dict[str, str],
    out: Path,
    *,
    expected: str,
    convert: Callable[[bytes], bytes] | None = None,
    ending: str | None = None,
    skip: set[str] | None = None,
) -> list[str]:
    """Put files of an archive or folder where they belong; those that are there already stay.

    Args:
        source: The archive or folder.
        wanted: Patterns of the last parts of a file's path, and the folder in ``out`` that such files go to.
        out: The folder to fill.
        expected: What ``source`` should be; for the message if it holds nothing of the kind.
        convert: Makes another content of what was read.
        ending: Replaces the ending of the file's name.
        skip: Names, without ending, of files to leave alone.

    Returns:
        The paths in ``source`` of all files that are wanted, skipped or not.
    """
    patterns = [(re.compile(rf"(?:^|/)({pattern})$"), out / folder) for pattern, folder in wanted.items()]
    taken: dict[Path, str] = {}
    again = "fetch it again and repeat the command"
    bad: list[Problem] = []
    with _reading(source):
        for member in _members(source):
            folder = next((folder for pattern, folder in patterns if pattern.search(member.name)), None)
            if folder is None:
                continue
            target = folder / Path(member.name).name
            target = target if ending is None else target.with_suffix(ending)
            if target in taken:
                raise ValueError(
                    f"{source} holds both {taken[target]} and {member.name}: give {expected}, and that alone"
                )
            taken[target] = member.name
            if target.stem not in (skip or ()) and (reason := _place(member, target, out, convert)):
                bad.append(Problem(member.name, f"cannot be used: {reason}", again))
    if bad:
        others = f" (and {len(bad) - 1} more of {len(taken)} files)" if len(bad) > 1 else ""
        message = f"{source}: {bad[0].file} {bad[0].found}{others}: {again}; the {len(taken) - len(bad)} "
        raise DataError(f"{message}others are in place", bad)
    if not taken:
        looked_for = " or ".join(wanted).replace("[^/.]+", "*").replace("\\.", ".")
        raise ValueError(f"{source} holds no {looked_for}: give {expected}")
    return list(taken.values())


def _place(member: Member, target: Path, out: Path, convert: Callable[[bytes], bytes] | None) -> str | None:
    """Write one file, unless it is there. Says why, if its content cannot be used."""
    if target.is_file() and (convert is not None or target.stat().st_size == member.size):
        return None
    with _writing(out):
        target.parent.mkdir(parents=True, exist_ok=True)
    if convert is None and member.path is not None:
        with _writing(out):
            replace_file(target, partial(_link, member.path))
        return None
    content = member.read()
    if convert is not None:
        try:
            content = convert(content)
        except ValueError as error:
            return str(error)
    with _writing(out):
        replace_file(target, partial(_write, content))
    return None


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, target)


def _members(source: Path) -> Iterator[Member]:
    """The files of an archive, in its order, or of a folder; shows how far it is.

    A folder's own name is part of the paths, as it would be in an archive of it.
    """
    text = f"unpacking {source.name}"
    if source.is_dir():
        files = list(_files(source.resolve()))
        yield from track(files, text, len(files), "files")
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            for entry in track(entries, text, len(entries), "files"):
                yield Member(entry.filename, entry.file_size, partial(archive.read, entry), None)
    elif source.suffix == ".json":
        yield Member(source.name, source.stat().st_size, source.read_bytes, source)
    else:
        progress = Progress(text, source.stat().st_size // MEGABYTE, "MB", transient=True)
        with source.open("rb") as file, tarfile.open(fileobj=file) as tar, progress:
            for info in tar:
                if info.isfile():  # neither folders nor links
                    yield Member(info.name, info.size, partial(_extract, tar, info), None)
                progress.advance(file.tell() // MEGABYTE - progress.done)


def _files(folder: Path) -> Iterator[Member]:
    def refuse(error: OSError) -> None:
        raise error

    for base, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            path = Path(base, name)
            inner = path.relative_to(folder.parent).as_posix()
            yield Member(inner, path.stat().st_size, path.read_bytes, path)


def _extract(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    assert file is not None  # only links and folders have none
    return file.read()


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Say what to do about an archive that cannot be read."""
    again = "fetch it again and repeat the command; what is unpacked stays"
    try:
        yield
    except PermissionError as error:
        raise ValueError(
            f"{error.filename or source} may not be read (permission denied): allow it with `chmod u+r`"
        ) from None
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if source.is_file() and not source.stat().st_size:
            raise ValueError(f"{source} is empty, 0 bytes: fetch it again") from None
        reason = str(error) or type(error).__name__
        if "could not be opened" in reason:  # tarfile then tells how it tried each compression
            reason = "neither tar nor zip"
        raise ValueError(f"{source} is cut short, damaged or no archive ({reason}): {again}") from None


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Say what to do about a folder that cannot be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{out} cannot be written ({error.strerror or error}): make room or name another folder, and "
            "repeat the command; what is there stays"
        ) from None
