"""COCO-20i: COCO with the official instance annotations drawn into labels, and the split into four folds.

A label is drawn once and kept as a PNG. Reading one takes 1.1 ms (640x480, 7 objects, one core); drawing it
from its polygons 2.7 ms, from run lengths not much less, and every process would hold the parsed annotations
of all images, over 2 GB for the training set of 2014. The PNGs of both splits take less than 1 GB of disk.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from svf_lightning.data.folds import COCO_CLASSES, split_classes
from svf_lightning.data.index import build_index
from svf_lightning.data.source import ImageIndex, Split
from svf_lightning.errors import DataError, MissingFileError
from svf_lightning.files import replace_file
from svf_lightning.progress import track

ANNOTATIONS = "annotations"
UNPACK = "unpack it again from the archive of annotations"  # the remedies
INSTANCES = "use instances_train*.json and instances_val*.json"
LIST = "images.txt"  # beside the drawn labels
YEARS = ("2014", "2017")


@dataclass(frozen=True)
class Coco:
    """COCO-20i in COCO's own folder layout.

    ========  ==========================================================================================
    images    JPEG, no side longer than 640 pixels, most of them 640x480; some are grey
    labels    drawn from the annotations by `prepare`: 8-bit PNG of the image's size, one class id per
              pixel; 0 background, 1..80 the classes of `COCO_CLASSES`. Nothing is ignored (no 255): a
              crowd is background, and where objects overlap, the one annotated later is on top
    train     2014: 82081 images; 2017: 117266. Those that have an object; the others can be in no episode
    val       2014: 40137 images; 2017: 4952
    folds     4, in two conventions whose results cannot be compared: "interleaved" (FWB, and PFENet, BAM,
              SVF, CyCTR, HSNet after it) tests f+1, f+5, .. f+77; "contiguous" (PANet) 20f+1 .. 20f+20
    ========  ==========================================================================================

    Under ``root`` lie, as they come out of the official archives::

        annotations/instances_train2014.json
        annotations/instances_val2014.json
        train2014/COCO_train2014_000000000009.jpg
        val2014/COCO_val2014_000000000042.jpg

    and, once drawn, ``labels/train2014/COCO_train2014_000000000009.png``, with the list of the images in the
    order of their ids, ``labels/train2014/images.txt``. From then on the annotations are not read again.

    The index decodes labels but looks only at both ends of an image: the archives carry a checksum of each
    file, so after `svf prepare coco` damage in the middle of one is not to be expected.

    Args:
        root: The folder above.
        year: ``"2014"`` (PFENet, BAM, SVF, HSNet, CWT) or ``"2017"`` (CyCTR).
        convention: ``"interleaved"`` or ``"contiguous"``.
        labels: Where the drawn labels go; None is ``labels`` under ``root``.
        min_pixels: Pixels of a class that an image must show to count as one of that class:
            2 * 32 * 32, of the original image, in the code of PFENet and all that follow it.
        whole_images: True decodes every image for the index, which takes thirty times as long.

    Raises:
        ValueError: If year or convention is none of those.

    Source:
        Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014.
        Nguyen and Todorovic, Feature Weighting and Boosting for Few-Shot Segmentation, ICCV 2019.
    """

    root: str | Path
    year: str | int = "2014"  # an int is what Hydra makes of data.source.year=2017
    convention: str = "interleaved"
    labels: str | Path | None = None
    min_pixels: int = 2 * 32 * 32
    whole_images: bool = False
    name: str = field(default="coco", init=False)
    class_names: tuple[str, ...] = field(default=COCO_CLASSES, init=False, repr=False)

    def __post_init__(self) -> None:
        if str(self.year) not in YEARS:
            raise ValueError(f"year is {self.year!r}; COCO-20i is drawn from {' or '.join(YEARS)}")
        split_classes(self.name, 0, self.convention)

    @property
    def edition(self) -> str:
        """The year and how the folds are cut."""
        return f"{self.year}, {self.convention} folds"

    def ensure(self) -> None:
        """Draw the labels, unless they are there; a drawing that was interrupted goes on.

        Raises:
            FileNotFoundError: If annotations or images are missing; says what to fetch.
            ValueError: If annotations are damaged or not COCO's, or labels cannot be written.
        """
        for split in ("train", "val"):
            if not (self._labels(split) / LIST).is_file():
                self._draw(split)

    def index(self, split: Split) -> ImageIndex:
        """Index the training or the test images.

        Raises:
            FileNotFoundError: If labels were not drawn, or files are missing.
            ValueError: If a file is bad, or ``split`` is neither "train" nor "val".
        """
        if split not in ("train", "val"):
            raise ValueError(f'split is {split!r}; a data set has "train" and "val"')
        images, labels = Path(self.root) / f"{split}{self.year}", self._labels(split)
        if not (labels / LIST).is_file():
            raise FileNotFoundError(f"no {labels / LIST}: the labels are not drawn yet; call ensure() first")
        names = (labels / LIST).read_text(encoding="utf-8").splitlines()
        return build_index(
            self.name,
            self.class_names,
            [(images / name, labels / f"{Path(name).stem}.png") for name in names],
            cache=labels / "index.npz",
            whole_images=self.whole_images,
        )

    def classes(self, fold: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Base and novel class ids of a fold."""
        return split_classes(self.name, fold, self.convention)

    def _labels(self, split: str) -> Path:
        """The folder of the drawn labels; it bears this name when all of them are."""
        folder = Path(self.root) / "labels" if self.labels is None else Path(self.labels)
        return folder / f"{split}{self.year}"

    def _draw(self, split: Split) -> None:
        root, name = Path(self.root), f"{split}{self.year}"
        source = root / ANNOTATIONS / f"instances_{name}.json"
        missing = [str(p.relative_to(root)) for p in (source, root / name) if not p.exists()]
        if missing:
            found = f"holds no {', '.join(missing)}"
            remedy = (
                f"Fetch train{self.year}.zip, val{self.year}.zip "
                f"and annotations_trainval{self.year}.zip from cocodataset.org (Download), then run `svf "
                f"prepare coco --year {self.year} --images train{self.year}.zip --images val{self.year}.zip "
                f"--annotations annotations_trainval{self.year}.zip --out {root}`"
            )
            message = f"no {', '.join(missing)} under root={root}. {remedy}"
            raise MissingFileError.of(root, found, remedy, message)
        content = source.read_bytes()
        annotated = read_annotations(source, content)
        present = set(os.listdir(root / name))
        absent = [image["file_name"] for image, _ in annotated if image["file_name"] not in present]
        if absent:
            number = f"{len(absent)} of the {len(annotated)} images"
            found = f"lacks {number} that {source.name} annotates, {absent[0]} for one"
            raise MissingFileError.of(root / name, found, f"unpack {name}.zip there again")
        draw_labels(annotated, self._labels(split), hashlib.sha256(content).hexdigest())


def read_annotations(
    path: str | Path, content: bytes | None = None
) -> list[tuple[dict[str, Any], list[tuple[int, Any]]]]:
    """Images of an instances file of COCO and what is to be drawn of each.

    Args:
        path: The file; messages name it.
        content: What it holds, if that was read before.

    Returns:
        For every image with an object, by image id: its record (``file_name``, ``height``, ``width``) and
        the class id (1..80, category ids renumbered in ascending order) and segmentation of each object, in
        the order of the file. Crowds are left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or not about the 80 categories of COCO.
    """
    path = Path(path)
    try:
        return _objects(path, json.loads(path.read_bytes() if content is None else content))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError.of(path, f"is damaged ({error})", UNPACK) from None
    except KeyError as error:
        raise DataError.of(path, f"has a record without {error}", UNPACK) from None


def draw_label(objects: Sequence[tuple[int, Any]], height: int, width: int) -> np.ndarray:
    """Draw objects into one label; a later one covers an earlier one.

    Args:
        objects: Class id and segmentation of each: polygons ``[[x, y, x, y, ...], ...]``, or run lengths,
            compressed or not, as COCO has them.
        height: Rows of the image.
        width: Columns of the image.

    Returns:
        Class ids, 0 where there is no object; uint8, shape ``(height, width)``.

    Raises:
        ValueError: If a segmentation cannot be drawn.

    Source:
        The coordinates are rounded to pixels by pycocotools, as everywhere in the field.

    Example:
        >>> draw_label([(3, [[0, 0, 2, 0, 2, 2, 0, 2]]), (7, [[1, 1, 4, 1, 4, 2, 1, 2]])], 3, 4)
        array([[3, 3, 0, 0],
               [3, 7, 7, 7],
               [0, 0, 0, 0]], dtype=uint8)
    """
    from pycocotools import mask

    label = np.zeros((height, width), np.uint8, order="F")  # columns first, as the masks: twice as fast
    for class_id, segmentation in objects:
        try:
            runs = segmentation
            if isinstance(segmentation, list):
                runs = mask.merge(mask.frPyObjects(segmentation, height, width))
            elif isinstance(segmentation["counts"], list):
                runs = mask.frPyObjects(segmentation, height, width)
            shape = mask.decode(runs)
            if shape.shape != label.shape:
                raise ValueError(f"it is {shape.shape[1]}x{shape.shape[0]} but the image {width}x{height}")
            np.copyto(label, class_id, where=shape.view(bool))
        except Exception as error:  # pycocotools raises whatever its C code stumbles over
            found = f"a segmentation of class {class_id} cannot be drawn ({error})"
            raise DataError.of("the image", found, "outline the object again") from None
    return np.ascontiguousarray(label)


def draw_labels(
    annotated: Sequence[tuple[Mapping[str, Any], Sequence[tuple[int, Any]]]], folder: Path, version: str
) -> None:
    """Draw the label of every image into ``folder``, with the list of the images.

    They are drawn beside it, and renamed when the last one is there. The name meanwhile bears the version of
    the annotations, so that a drawing that was interrupted goes on, but never with other annotations.

    Args:
        annotated: What `read_annotations` gives.
        folder: To be made.
        version: Of the annotations: a text that changes when they do.

    Raises:
        ValueError: If an image's objects cannot be drawn, or the labels cannot be written.
    """
    partial = folder.with_name(f"{folder.name}.partial-{version[:8]}")

    def draw(entry: tuple[Mapping[str, Any], Sequence[tuple[int, Any]]]) -> None:
        image, objects = entry
        target = partial / f"{Path(image['file_name']).stem}.png"
        if target.is_file():
            return
        try:
            label = Image.fromarray(draw_label(objects, image["height"], image["width"]))
        except DataError as error:
            (problem,) = error.problems
            file, remedy = image["file_name"], "unpack the annotations again"
            message = f"{file}: {problem.found}: {remedy}"
            raise DataError.of(file, problem.found, remedy, message) from None
        replace_file(target, lambda path: label.save(path, "PNG", compress_level=1))

    names = "".join(f"{image['file_name']}\n" for image, _ in annotated)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            try:
                done = pool.map(draw, annotated)
                for _ in track(done, f"drawing {folder.name}", len(annotated), "labels"):
                    pass
            except BaseException:  # do not go on to draw the thousands still waiting
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        (partial / LIST).write_text(names, encoding="utf-8")
        os.rename(partial, folder)
    except OSError as error:
        if (folder / LIST).is_file():  # another job drew them meanwhile
            return
        reason = error.strerror or error
        remedy = (
            "make room there, or name another folder (data.source.labels=...); what is drawn stays, and the "
            "next start goes on"
        )
        message = f"labels cannot be written to {folder} ({reason}): {remedy}"
        raise DataError.of(folder, f"cannot be written ({reason})", remedy, message) from error


def _objects(path: Path, tables: Any) -> list[tuple[dict[str, Any], list[tuple[int, Any]]]]:
    """What `read_annotations` gives, from the parsed file."""
    if not isinstance(tables, dict) or not {"images", "annotations", "categories"} <= tables.keys():
        found = "is no instances file of COCO (it lacks images, annotations or categories)"
        raise DataError.of(path, found, f"{INSTANCES}, not captions, keypoints or image lists")
    categories = sorted((category["id"], category["name"]) for category in tables["categories"])
    if tuple(name for _, name in categories) != COCO_CLASSES:
        theirs = _sample([name for _, name in categories])
        found = f"has {len(categories)} categories, {theirs}, but COCO has these 80: {_sample(COCO_CLASSES)}"
        remedy = "for annotations of your own use data=folder"
        raise DataError.of(path, found, remedy, f"{path} {found}; {remedy}")
    class_of = {category_id: number for number, (category_id, _) in enumerate(categories, start=1)}
    images = {image["id"]: image for image in tables["images"]}
    objects: dict[int, list[tuple[int, Any]]] = {}
    for annotation in tables["annotations"]:
        if annotation.get("iscrowd", 0):
            continue
        for key, known in (("category_id", class_of), ("image_id", images)):
            if annotation[key] not in known:
                number = annotation["id"]
                found = f"annotation {number} has {key} {annotation[key]}, which the file does not list"
                raise DataError.of(path, found, UNPACK, f"{path}: {found}: {UNPACK}")
        of_image = objects.setdefault(annotation["image_id"], [])
        of_image.append((class_of[annotation["category_id"]], annotation["segmentation"]))
    if not objects:
        found = f"annotates no object in {len(images)} images"
        raise DataError.of(path, found, f"{INSTANCES} (image_info_*.json has no annotations)")
    return [
        ({key: images[image_id][key] for key in ("file_name", "height", "width")}, objects[image_id])
        for image_id in sorted(objects)
    ]


def _sample(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" .. {names[-1]}" if len(names) > 3 else "")
