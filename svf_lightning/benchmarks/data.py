"""`svf benchmark data`: episodes per second of one loading process, and the time of each step.

    svf benchmark data

Photographs are made up at VOC's size (500x375, JPEG of about 100 KB) in a temporary folder, with PNG labels,
and read by the very code that training uses. Times are CPU time of one thread, as a worker has it, so what
else runs on the machine matters little. Of several rounds the fastest counts.

The other paths do the same steps as ours with the same numbers, in other libraries. They stand here to show
what was compared; their pixels differ from ours by rounding to whole grey values after every step.
"""

import cProfile
import io
import pstats
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from svf_lightning.data.episodes import EpisodeDataset, Transform
from svf_lightning.data.images import read_image
from svf_lightning.data.index import build_index
from svf_lightning.data.source import ImageIndex
from svf_lightning.data.transforms import Augment, Letterbox, normalize
from svf_lightning.episode import IGNORE

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = ("one", "two")

# Functions of ours and the step that their time is booked on.
STEPS = {
    "read_image": "decode the image",
    "decode_label": "decode the label",
    "binary_mask": "mask of the class",
    "normalize": "normalise",
    "resize_pair": "resize",
    "_rotate": "rotate (half of them)",
    "_blur": "blur (half of them)",
    "_crop": "crop",
    "default_collate": "collate, batches of 4",
}


class Speed(NamedTuple):
    """How fast one worker is, and where its time goes."""

    stage: str  # "training" or "test"
    shot: int
    episodes_per_second: float
    milliseconds: dict[str, float]  # CPU time in an episode, by step; "everything" is all of it


def make_images(folder: Path, count: int, width: int = 500, height: int = 375) -> ImageIndex:
    """Write photographs of noise with the fall-off of natural ones, and their labels; a third are upright.

    Args:
        folder: Where they go.
        count: How many.
        width: Pixels of the longer side.
        height: Pixels of the shorter side.
    """
    rng = np.random.default_rng(0)
    pairs = []
    for number in range(count):
        size = (width, height) if number % 3 else (height, width)
        image, label = folder / f"{number}.jpg", folder / f"{number}.png"
        _photograph(rng, size).save(image, quality=94)
        ids = np.zeros(size[::-1], np.uint8)
        ids[size[1] // 6 : -size[1] // 6, size[0] // 5 : -size[0] // 5] = IGNORE
        ids[size[1] // 6 + 4 : -size[1] // 6 - 4, size[0] // 5 + 4 : -size[0] // 5 - 4] = number % 2 + 1
        Image.fromarray(ids).save(label)
        pairs.append((image, label))
    return build_index("benchmark", CLASSES, pairs, cache=folder / "index.npz")


def _photograph(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    canvas = np.zeros((size[1], size[0], 3), np.float32)
    for bumps in (2, 4, 8, 16, 32, 64, 128, 256, 400):
        noise = rng.standard_normal((3, bumps + 1, bumps + 1)).astype(np.float32)
        layers = [Image.fromarray(layer).resize(size, Image.Resampling.BICUBIC) for layer in noise]
        canvas += np.stack([np.asarray(layer) for layer in layers], axis=-1) * 60 / bumps**0.4
    return Image.fromarray((128 + canvas).clip(0, 255).astype(np.uint8))


def measure(index: ImageIndex, size: int, shots: Sequence[int], rounds: int, episodes: int) -> list[Speed]:
    """Episodes a second of one worker, in training and in test, and the time of each step.

    Args:
        index: The images.
        size: Side of the square that the network gets.
        shots: Support images per episode, several settings.
        rounds: Of which the fastest counts.
        episodes: In a round; a multiple of 4.
    """
    stages: dict[str, Transform] = {"training": Augment(size, MEAN, STD), "test": Letterbox(size, MEAN, STD)}
    return [
        _measure(
            stage, EpisodeDataset(index, (1, 2), shot, transform, seed=0, min_pixels=1), rounds, episodes
        )
        for stage, transform in stages.items()
        for shot in shots
    ]


def _measure(stage: str, dataset: EpisodeDataset, rounds: int, episodes: int) -> Speed:
    def load() -> None:
        for start in range(0, episodes, 4):
            default_collate([dataset[0, (start + i) % len(dataset)] for i in range(4)])

    seconds = min(_cpu_seconds(load) for _ in range(rounds))
    profile = cProfile.Profile(time.process_time)
    profile.runcall(load)
    # The profiler itself takes time, so its shares are spread over the time without it.
    statistics: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    total = max(cumulative for _, _, _, cumulative, _ in statistics.values())
    milliseconds = dict.fromkeys(STEPS.values(), 0.0)
    for (_, _, function), (_, _, _, cumulative, _) in statistics.items():
        if function in STEPS:
            milliseconds[STEPS[function]] += 1000 * cumulative / total * seconds / episodes
    everything = 1000 * seconds / episodes
    milliseconds["draw, flip, stack, pad"] = everything - sum(milliseconds.values())
    milliseconds["everything"] = everything
    return Speed(stage, dataset.shot, episodes / seconds, milliseconds)


def compare_decoders(index: ImageIndex, size: int, rounds: int) -> dict[str, float]:
    """CPU milliseconds to make a JPEG file a tensor of the same pixels, by several ways."""
    paths = [pair[0] for pair in index.read.args[0]]  # type: ignore[attr-defined]

    def draft(path: str) -> Tensor:
        with Image.open(path) as image:
            image.draft("RGB", (size, size))  # may shrink while decoding, by 2, 4 or 8, to no less than this
            return torch.from_numpy(np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy())

    def torchvision(path: str) -> Tensor:
        content = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8)
        return decode_image(content, ImageReadMode.RGB)

    ways = {"Pillow (ours)": read_image, "Pillow, draft mode": draft}
    try:  # deprecated since torchvision 0.29, so it may be gone
        from torchvision.io import ImageReadMode, decode_image
    except ImportError:
        pass
    else:
        ways["torchvision.io"] = torchvision
    return _fastest({name: partial(_for_all, way, paths) for name, way in ways.items()}, rounds, len(paths))


def compare_augmentations(index: ImageIndex, size: int, rounds: int) -> dict[str, float]:
    """CPU milliseconds to augment an image and its mask in the same five steps, by several ways.

    Every second image is rotated and every second one blurred, as the recipe has it on average.
    """
    ours = Augment(size, MEAN, STD, rotate_p=0.5, blur_p=0.5)
    pairs = [index.read(position) for position in range(len(index))]
    pictures = [(Image.fromarray(i.permute(1, 2, 0).numpy()), Image.fromarray(m.numpy())) for i, m in pairs]
    jobs = list(enumerate(pairs)), list(enumerate(pictures))

    def grid_sample(job: tuple[int, tuple[Tensor, Tensor]]) -> None:
        number, (image, mask) = job
        ours(image, mask, np.random.default_rng(number))

    def torchvision(job: tuple[int, tuple[Tensor, Tensor]], floating: bool) -> Tensor:
        number, (image, mask) = job
        rng = np.random.default_rng(number)
        factor, degrees = rng.uniform(0.9, 1.1), rng.uniform(-10, 10)
        sides = [round(side * factor) for side in mask.shape]
        image = normalize(image, MEAN, STD) if floating else image
        image = v2.resize_image(image, sides, InterpolationMode.BILINEAR, antialias=False)
        mask = v2.resize_mask(mask[None], sides)
        if number % 2:
            image = v2.rotate_image(image, degrees, InterpolationMode.BILINEAR)
            mask = v2.rotate_mask(mask, degrees, fill=[IGNORE])
        if number % 4 < 2:
            image = v2.gaussian_blur_image(image, [5, 5], [1.1, 1.1])
        image, mask = v2.horizontal_flip_image(image), v2.horizontal_flip_mask(mask)
        missing = [0, 0, max(0, size - sides[1]), max(0, size - sides[0])]  # left, top, right, bottom
        image, mask = v2.pad_image(image, missing), v2.pad_mask(mask, missing, fill=IGNORE)
        top, left = (int(rng.integers(length - size + 1)) for length in mask.shape[-2:])
        image = v2.crop_image(image, top, left, size, size)
        v2.crop_mask(mask, top, left, size, size)
        return image if floating else normalize(image, MEAN, STD)

    def pillow(job: tuple[int, tuple[Image.Image, Image.Image]]) -> Tensor:
        number, (image, mask) = job
        rng = np.random.default_rng(number)
        factor, degrees = rng.uniform(0.9, 1.1), rng.uniform(-10, 10)
        sides = round(image.width * factor), round(image.height * factor)
        # An affine map, as Pillow's resize always smooths when it makes an image smaller.
        scale = (1 / factor, 0, 0, 0, 1 / factor, 0)
        image = image.transform(sides, Image.Transform.AFFINE, scale, Image.Resampling.BILINEAR)
        mask = mask.transform(sides, Image.Transform.AFFINE, scale, Image.Resampling.NEAREST)
        if number % 2:
            image = image.rotate(degrees, Image.Resampling.BILINEAR)
            mask = mask.rotate(degrees, Image.Resampling.NEAREST, fillcolor=IGNORE)
        if number % 4 < 2:
            image = image.filter(ImageFilter.GaussianBlur(1.1))
        image, mask = (part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for part in (image, mask))
        left, top = (int(rng.integers(max(0, length - size) + 1)) for length in sides)
        image, mask = (part.crop((left, top, left + size, top + size)) for part in (image, mask))
        np.asarray(mask)
        return normalize(torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()), MEAN, STD)

    ways = {
        "ours: float, grid_sample": partial(_for_all, grid_sample, jobs[0]),
        "torchvision v2, float": partial(_for_all, partial(torchvision, floating=True), jobs[0]),
        "torchvision v2, uint8": partial(_for_all, partial(torchvision, floating=False), jobs[0]),
        "Pillow": partial(_for_all, pillow, jobs[1]),
    }
    return _fastest(ways, rounds, len(pairs))


def _for_all(function: Callable[[Any], Any], items: Sequence[Any]) -> None:
    for item in items:
        function(item)


def _cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def _fastest(ways: Mapping[str, Callable[[], object]], rounds: int, items: int) -> dict[str, float]:
    """CPU milliseconds per item of each way, which take turns, so that a slow minute falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(_cpu_seconds(way))
    return {name: 1000 * min(seconds) / items for name, seconds in times.items()}


def run(size: int = 473, shots: Sequence[int] = (1, 5), images: int = 24, rounds: int = 5) -> str:
    """Measure everything with one thread, and put it into Markdown tables.

    Args:
        size: Side of the square that the network gets.
        shots: Support images per episode, several settings.
        images: Photographs to make.
        rounds: Of every measurement; the fastest counts.

    Raises:
        ValueError: If a number is too small.
    """
    least = {"size": (size, 8), "images": (images, 2 * max(shots, default=0) + 2), "rounds": (rounds, 1)}
    least["shot"] = (min(shots, default=0), 1)
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise ValueError(f"{name} is {value}; the benchmark needs at least {smallest}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="svf_benchmark_") as folder:
            index = make_images(Path(folder), images)
            kilobytes = sum(path.stat().st_size for path in Path(folder).glob("*.jpg")) / images / 1024
            speeds = measure(index, size, shots, rounds, episodes=max(4, images // 4 * 4))
            decoders = compare_decoders(index, size, rounds)
            augmentations = compare_augmentations(index, size, rounds)
    finally:
        torch.set_num_threads(threads)
    return _report(size, kilobytes, rounds, speeds, decoders, augmentations)


def _report(
    size: int,
    kilobytes: float,
    rounds: int,
    speeds: Sequence[Speed],
    decoders: dict[str, float],
    augmentations: dict[str, float],
) -> str:
    report = io.StringIO()
    write = partial(print, file=report)
    write(
        f"One worker, one thread, CPU time, best of {rounds}. Images of 500x375, {kilobytes:.0f} KB; "
        f"{size} for the network.\n"
    )
    write("| | " + " | ".join(f"{speed.stage}, {speed.shot} shot" for speed in speeds) + " |")
    write("|---" * (len(speeds) + 1) + "|")
    write(
        "| **episodes/s** | " + " | ".join(f"**{speed.episodes_per_second:.1f}**" for speed in speeds) + " |"
    )
    for step in speeds[0].milliseconds:
        cells = (f"{speed.milliseconds[step]:.1f}" for speed in speeds)
        write(f"| {step}, ms | " + " | ".join(cells) + " |")
    for title, table in (("decode one JPEG", decoders), ("augment one image and mask", augmentations)):
        write(f"\n| {title} | ms |\n|---|---|")
        for way, milliseconds in table.items():
            write(f"| {way} | {milliseconds:.2f} |")
    return report.getvalue().rstrip()
