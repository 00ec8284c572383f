"""Emoji-5i: the built-in data set, drawn in seconds from sprites that come with the package.

It needs no download, so everything from a first run to a test of the whole road can use it. It is written
in the VOC folder layout and read by the same code as PASCAL-5i.
"""

import csv
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from uuid import uuid4

import numpy as np
from PIL import Image, ImageFilter

from svf_lightning.data.folds import EMOJI_CLASSES, split_classes
from svf_lightning.data.index import build_index
from svf_lightning.data.pascal import IMAGES, LABELS, LISTS, read_image_list, voc_palette
from svf_lightning.data.source import ImageIndex, Split
from svf_lightning.episode import IGNORE
from svf_lightning.errors import DataError
from svf_lightning.progress import track

SPRITES = Path(__file__).parent / "sprites"
MARKER = "emoji.json"
GENERATOR = 1  # raise it with every change that makes other images from the same settings

OBJECTS_PER_IMAGE = (1, 1, 1, 2, 2, 2, 2, 3, 3, 3)  # adds up to the 20 classes: ten images show each once
LONG_SIDE = (0.3, 0.6)  # of an object, in image sides
LARGEST_TURN = 20.0  # degrees
LEAST_VISIBLE = 0.6  # of every object, once all are pasted
SPLIT_TAGS = {"train": 1, "val": 2}


@dataclass(frozen=True)
class Emoji:
    """Emoji-5i, made under ``root`` on first use.

    ========  ==========================================================================================
    images    JPEG (quality 95), RGB, square; one to three drawings of different classes, flipped,
              turned, scaled and pasted over a made background; a later one may hide part of an earlier
    labels    8-bit palette PNG of the image's size; 0 background, 1..20 the classes of `EMOJI_CLASSES`
              (in alphabetical order), 255 ignored (a thin line around every object)
    train     1600 images; every class in 160 of them
    val       400 images; every class in 40 of them
    folds     4; fold f tests the five classes 5f+1 .. 5f+5
    drawings  334 by four vendors, 8 to 29 a class; licences in ``sprites/LICENSES.md``, which is copied
              beside the images. Both splits use all of them: novel are the classes, as in PASCAL-5i
    ========  ==========================================================================================

    Args:
        root: Where the images are, or will be made. It must be left to this data set alone.
        train_images: Number of training images.
        val_images: Number of test images.
        image_size: Height and width of an image in pixels.
        seed: Another seed gives other images.

    Raises:
        ValueError: If a number is out of range.
    """

    root: str | Path
    train_images: int = 1600
    val_images: int = 400
    image_size: int = 128
    seed: int = 0
    name: str = field(default="emoji", init=False)
    class_names: tuple[str, ...] = field(default=EMOJI_CLASSES, init=False, repr=False)

    def __post_init__(self) -> None:
        for argument, least in (("train_images", 1), ("val_images", 1), ("image_size", 32), ("seed", 0)):
            value = getattr(self, argument)
            if type(value) is not int or value < least:
                raise ValueError(f"{argument} is {value!r}; it must be a whole number of at least {least}")

    @property
    def min_pixels(self) -> int:
        """Pixels of a class that an image must show: the share that 2048 are of VOC's usual 500x375."""
        return round(2048 / (500 * 375) * self.image_size**2)

    @property
    def edition(self) -> str:
        """How the folds are cut, and the settings that the images were made with."""
        return (
            f"contiguous folds, {self.train_images} + {self.val_images} images of {self.image_size} pixels, "
            f"made with seed {self.seed}"
        )

    def ensure(self) -> None:
        """Make the images, unless they are there.

        They are made in a folder of their own that is renamed to ``root`` when it is whole. So an
        interrupted start leaves no half set, and of several jobs that start at once each makes one and the
        first to finish gives it its name. (A job that is killed outright leaves ``<root>.partial-...``
        behind, which may be deleted.)

        Raises:
            ValueError: If ``root`` holds something else or a set of other settings, or cannot be written.
        """
        if self._is_made():
            return
        root = Path(self.root).absolute()
        partial_root = root.with_name(f"{root.name}.partial-{uuid4().hex[:8]}")
        try:
            self._make(partial_root)
            os.rename(partial_root, root)
        except OSError as error:
            if not self._is_made():  # else another job was first
                raise ValueError(
                    f"emoji images cannot be written to root={self.root} ({error}): name another root"
                ) from error
        finally:
            shutil.rmtree(partial_root, ignore_errors=True)

    def index(self, split: Split) -> ImageIndex:
        """Index the training or the test images.

        Raises:
            FileNotFoundError: If the images have not been made, or some are gone.
            ValueError: If a file is damaged, or ``split`` is neither "train" nor "val".
        """
        if split not in SPLIT_TAGS:
            raise ValueError(f'split is {split!r}; a data set has "train" and "val"')
        if not self._is_made():
            raise FileNotFoundError(f"no emoji images under root={self.root}: call ensure() first")
        pairs = read_image_list(self.root, f"{LISTS}/{split}.txt")
        return build_index(self.name, self.class_names, pairs, cache=Path(self.root) / f"index_{split}.npz")

    def classes(self, fold: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Base and novel class ids of a fold."""
        return split_classes(self.name, fold)

    def _settings(self) -> dict[str, int]:
        return {
            "generator": GENERATOR,
            "train_images": self.train_images,
            "val_images": self.val_images,
            "image_size": self.image_size,
            "seed": self.seed,
        }

    def _is_made(self) -> bool:
        root = Path(self.root)
        marker = root / MARKER
        if not marker.is_file():
            if root.exists() and (not root.is_dir() or any(root.iterdir())):
                found = f"exists but holds no emoji images (no {MARKER} in it)"
                raise DataError.of(
                    root, found, "name another root", f"root={root} {found}: name another root"
                )
            return False
        try:
            settings = json.loads(marker.read_text(encoding="utf-8"))
        except ValueError:
            settings = None
        if not isinstance(settings, dict):
            raise DataError.of(marker, "is damaged", f"delete {root} and start again")
        wanted = self._settings()
        if settings != wanted:
            differences = ", ".join(
                f"{key} {settings.get(key)} instead of {value}"
                for key, value in wanted.items()
                if settings.get(key) != value
            )
            found, remedy = f"holds emoji images made with {differences}", "name another root, or delete it"
            raise DataError.of(root, found, remedy, f"root={root} {found}: {remedy}")
        return True

    def _make(self, folder: Path) -> None:
        """Write the whole set into a new folder, the marker last."""
        for name in (IMAGES, LABELS, LISTS):
            (folder / name).mkdir(parents=True)
        jobs = [
            (split, number)
            for split, images in (("train", self.train_images), ("val", self.val_images))
            for number in range(images)
        ]
        # Threads, not processes: most of the time goes to Pillow, which lets go of the interpreter lock.
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            try:
                made = pool.map(partial(self._write, folder), jobs)
                names = list(track(made, "drawing emoji-5i", len(jobs), "images"))
            except BaseException:  # Ctrl-C: do not go on to draw the images still waiting
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        for split in SPLIT_TAGS:
            lines = [f"{name}\n" for (of, _), name in zip(jobs, names, strict=True) if of == split]
            (folder / LISTS / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
        shutil.copyfile(SPRITES / "LICENSES.md", folder / "LICENSES.md")
        (folder / MARKER).write_text(json.dumps(self._settings(), indent=2) + "\n", encoding="utf-8")

    def _write(self, folder: Path, job: tuple[Split, int]) -> str:
        split, number = job
        name = f"emoji_{split}_{number:06d}"
        image, label = draw(split, number, seed=self.seed, image_size=self.image_size)
        image.save(folder / IMAGES / f"{name}.jpg", quality=95)
        label.save(folder / LABELS / f"{name}.png")
        return name


def draw(
    split: Split, number: int, *, seed: int = 0, image_size: int = 128
) -> tuple[Image.Image, Image.Image]:
    """Draw one image and its label, from the arguments alone.

    Args:
        split: "train" or "val".
        number: Which image of the split, counted from 0.
        seed: Seed of the set.
        image_size: Height and width in pixels.

    Returns:
        The image (RGB), and the label (palette image of class ids and 255).
    """
    rng = np.random.default_rng([seed, SPLIT_TAGS[split], number])
    image = _background(rng, image_size)
    label = Image.new("L", image.size)
    areas: dict[int, int] = {}  # of each object, whole
    for class_id in _classes_of_image(split, number, seed):
        drawings = _drawings()[class_id]
        drawing = _turn(drawings[rng.integers(len(drawings))], rng)
        side = rng.uniform(*LONG_SIDE) * image_size
        while True:
            sprite = _scale(drawing, side)
            shape = sprite.getchannel("A").point(lambda alpha: 255 * (alpha >= 128))
            place = _place(sprite.size, image_size, rng)
            tried = label.copy()
            _stamp(tried, shape, place, class_id)
            areas[class_id] = shape.histogram()[255]
            visible = tried.histogram()
            if all(visible[other] >= LEAST_VISIBLE * area for other, area in areas.items()):
                break
            side *= 0.97  # the smaller, the less it can hide: this ends
        image.paste(sprite, place, sprite)
        label = tried
    label.putpalette(voc_palette())  # makes it a palette image; the numbers stay
    return image, label


def _classes_of_image(split: Split, number: int, seed: int) -> list[int]:
    """Class ids of the objects in an image, back to front.

    Ten images in a row share out all classes, so that over a split all are equally frequent; yet each image
    can be made without the others.
    """
    block, place = divmod(number, len(OBJECTS_PER_IMAGE))
    rng = np.random.default_rng([seed, SPLIT_TAGS[split], block, 1])  # 1: not the stream of image `block`
    counts = rng.permutation(OBJECTS_PER_IMAGE)
    order = rng.permutation(len(EMOJI_CLASSES)) + 1
    first = int(counts[:place].sum())
    return [int(class_id) for class_id in order[first : first + counts[place]]]


@cache
def _drawings() -> dict[int, list[Image.Image]]:
    """All sprites (RGBA) by class id."""
    drawings: dict[int, list[Image.Image]] = {class_id: [] for class_id in range(1, len(EMOJI_CLASSES) + 1)}
    with (SPRITES / "manifest.csv").open(encoding="utf-8", newline="") as manifest:
        for row in csv.DictReader(manifest):
            with Image.open(SPRITES / row["file"]) as sprite:
                drawings[EMOJI_CLASSES.index(row["class"]) + 1].append(sprite.convert("RGBA"))
    return drawings


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """Two colours that flow into one another along a gradient bent by smooth noise, with some texture."""
    y, x = np.mgrid[-0.5 : 0.5 : size * 1j, -0.5 : 0.5 : size * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    ramp = math.cos(angle) * x + math.sin(angle) * y
    if rng.random() < 0.3:  # round instead of straight
        ramp = 1.5 * np.hypot(x - rng.uniform(-0.4, 0.4), y - rng.uniform(-0.4, 0.4)) - 0.6
    bent = rng.uniform(0.3, 1.5) * ramp + rng.uniform(0, 0.6) * _noise(rng, (2, 4, 8), size)
    # From a soft flow, where this is gentle, to patches with visible borders, where it is steep.
    steepness = rng.choice([1.0, 2.5, 20.0])
    mixed = 0.5 + 0.5 * np.tanh(steepness * bent)[..., None]  # (H, W, 1)
    colours = rng.uniform(20, 235, (2, 3)).astype(np.float32)
    shading = rng.uniform(2, 14) * _noise(rng, (5, 10, 20, 40), size)[..., None]
    grain = rng.uniform(0, 5) * rng.standard_normal((size, size, 1), dtype=np.float32)
    canvas = colours[0] + (colours[1] - colours[0]) * mixed + (shading + grain)  # (H, W, 3)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def _noise(rng: np.random.Generator, octaves: tuple[int, ...], size: int) -> np.ndarray:
    """Smooth noise, float32, shape ``(size, size)``: an octave has that many bumps a side.

    The first octave has unit scale, and the others are the weaker, the finer they are.
    """
    total = np.zeros((size, size), np.float32)
    for bumps in octaves:
        grid = rng.standard_normal((bumps + 1, bumps + 1), dtype=np.float32)
        total += np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC)) * (
            octaves[0] / bumps
        )
    return total


def _turn(drawing: Image.Image, rng: np.random.Generator) -> Image.Image:
    if rng.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle = rng.uniform(-LARGEST_TURN, LARGEST_TURN)
    drawing = drawing.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    return drawing.crop(drawing.getchannel("A").getbbox())


def _scale(drawing: Image.Image, side: float) -> Image.Image:
    """Resize to a longer side of ``side`` pixels."""
    factor = side / max(drawing.size)
    width, height = (max(1, round(factor * length)) for length in drawing.size)
    return drawing.resize((width, height), Image.Resampling.BICUBIC)


def _place(sprite: tuple[int, int], size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Left and upper end of a sprite; up to a tenth of it may stick out of the image."""
    left, top = (int(rng.integers(-length // 10, size - length + length // 10 + 1)) for length in sprite)
    return left, top


def _stamp(label: Image.Image, shape: Image.Image, place: tuple[int, int], class_id: int) -> None:
    """Write an object into a label, with the ignored line around it."""
    line = max(1, round(max(label.size) / 128))
    wide = Image.new("L", (shape.width + 2 * line, shape.height + 2 * line))
    wide.paste(shape, (line, line))
    wide = wide.filter(ImageFilter.MaxFilter(2 * line + 1))
    label.paste(IGNORE, (place[0] - line, place[1] - line), wide)
    label.paste(class_id, place, shape)
