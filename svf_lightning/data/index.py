"""The index of a data set: its images, and how many pixels of every class each one shows.

An index says which images there are and how many pixels of every class each one shows. That is all an
episode sampler needs to know, and counting takes a decode of every file, so it is done once and kept in a
file beside the data.

Pillow decodes. For a 500x375 JPEG it takes 1.5 times as long as ``torchvision.io`` (1.85 and 1.27 ms), with
equal pixels: a twentieth of an episode (`svf benchmark data`). But it reads every format alike, keeps
palette indices, and says when a file is cut short; and torchvision 0.29 deprecated its decoders.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from svf_lightning.data.images import decode_label, header_size, image_size, read_image
from svf_lightning.data.source import ImageIndex
from svf_lightning.episode import IGNORE
from svf_lightning.errors import DataError, MissingFileError
from svf_lightning.files import replace_file
from svf_lightning.progress import track

log = logging.getLogger(__name__)


def read_pair(
    pairs: Sequence[tuple[str, str]], decode: Callable[[str], np.ndarray], position: int
) -> tuple[Tensor, Tensor]:
    """Read image and label number ``position`` of ``pairs``; `ImageIndex.read` is a partial of this."""
    image, label = pairs[position]
    return read_image(image), torch.from_numpy(decode(label))


def build_index(
    name: str,
    class_names: Sequence[str],
    pairs: Sequence[tuple[str | Path, str | Path]],
    *,
    cache: str | Path,
    ids: Sequence[str] | None = None,
    workers: int | None = None,
    decode: Callable[[str], np.ndarray] = decode_label,
    whole_images: bool = True,
) -> ImageIndex:
    """Decode every image and label once, check them, and count the pixels of each class.

    The counts are kept in ``cache`` and trusted as long as the list, and the size and time of change of
    every file on it, stay the same. Where ``cache`` cannot be written, the user's cache folder takes it.

    Args:
        name: What the data set is called.
        class_names: Names of the classes 1..N.
        pairs: Image path and label path, one pair per image.
        cache: Where the counts go, a ``.npz`` in a folder that exists.
        ids: What each image is called; None takes the name of the image file without its ending.
        workers: Threads that decode; None takes as many as there are processors.
        decode: Reads a label file: class ids and 255, uint8, shape ``(H, W)``.
        whole_images: False reads of each image its header and its last bytes, in a hundredth of the time.
            That finds what a broken download leaves; damage in the middle is found when it is drawn.

    Raises:
        MissingFileError: If files are missing, and nothing else is wrong.
        DataError: If files cannot be decoded, differ in size from their partner, or hold ids that are neither
            0..N nor 255. All such files are reported at once.
        ValueError: If there are no pairs.
    """
    if not pairs:
        raise ValueError(f"{name}: the list of images is empty; an index needs at least one")
    paths = tuple((str(image), str(label)) for image, label in pairs)
    cache = Path(cache)
    key = state_of_files(name, len(class_names), paths, cache.parent)
    pixels = load_counts(cache, key, (len(paths), len(class_names) + 1))
    if pixels is None:
        size_of = image_size if whole_images else header_size
        pixels = _count_all(name, paths, partial(_count, len(class_names), size_of, decode), workers)
        save_counts(cache, key, pixels)
    return ImageIndex(
        name=name,
        class_names=tuple(class_names),
        ids=tuple(ids) if ids is not None else tuple(Path(image).stem for image, _ in paths),
        pixels=pixels,
        read=partial(read_pair, paths, decode),
    )


def _count(
    classes: int,
    size_of: Callable[[str], tuple[int, int]],
    decode: Callable[[str], np.ndarray],
    pair: tuple[str, str],
) -> tuple[np.ndarray, list[DataError]]:
    """Pixels of each class in one label, shape ``(N + 1,)``, and what is wrong with the pair."""
    image_path, label_path = pair
    errors: list[DataError] = []
    size = label = None
    try:
        size = size_of(image_path)
    except DataError as error:
        errors.append(error)
    try:
        label = decode(label_path)
    except DataError as error:
        errors.append(error)
    if label is None:
        return np.zeros(classes + 1, np.int64), errors

    if size is not None and size != label.shape[::-1]:
        (width, height), (label_height, label_width) = size, label.shape
        found = (
            f"is {label_width}x{label_height} but its image {Path(image_path).name} is {width}x{height} "
            "(width x height)"
        )
        errors.append(DataError.of(label_path, found, "a label needs the size of its image"))
    histogram = np.bincount(label.reshape(-1), minlength=256)
    unknown = [int(class_id) for class_id in np.flatnonzero(histogram[:IGNORE]) if class_id > classes]
    if unknown:
        found = f"holds the ids {_shorten(unknown)}, but labels hold 0..{classes} and {IGNORE}"
        remedy = "renumber it, or check that it is a label of class ids (not of colours or objects)"
        errors.append(DataError.of(label_path, found, remedy))
    return histogram[: classes + 1].astype(np.int64), errors


def _count_all(
    name: str,
    paths: Sequence[tuple[str, str]],
    count: Callable[[tuple[str, str]], tuple[np.ndarray, list[DataError]]],
    workers: int | None = None,
) -> np.ndarray:
    """Pixels of each class in each label, shape ``(images, N + 1)``; one error for all bad files."""
    # Threads are enough: Pillow lets go of the interpreter lock while it decodes.
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        try:
            results = list(track(pool.map(count, paths), f"indexing {name}", len(paths), "images"))
        except BaseException:  # Ctrl-C: do not go on to decode the thousands still waiting
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    errors = [error for _, of_image in results for error in of_image]
    if errors:
        message = _shorten(errors, separator="; ")
        if len(errors) > 1:
            message = f"{name}: {len(errors)} files cannot be used: {message}"
        missing = all(isinstance(error, MissingFileError) for error in errors)
        kind = MissingFileError if missing else DataError
        raise kind(message, [problem for error in errors for problem in error.problems])
    return np.stack([counts for counts, _ in results])


def _shorten(items: Sequence[object], separator: str = ", ", most: int = 10) -> str:
    """The first ten of many, and how many more there are."""
    shown = separator.join(str(item) for item in items[:most])
    return shown if len(items) <= most else f"{shown}{separator}and {len(items) - most} more"


def state_of_files(name: str, classes: int, paths: Sequence[tuple[str, str]], base: Path) -> str:
    """A text that changes when the list does, or the size or time of change of any file on it."""
    digest = hashlib.sha256(f"1 {name} {classes}".encode())  # 1: version of what is counted and checked
    for path in (path for pair in paths for path in pair):
        try:
            stat = os.stat(path)
            state = f"{stat.st_size} {stat.st_mtime_ns}"
        except OSError:
            state = "missing"  # decoding will report it, along with everything else that is wrong
        # relative, so that a data folder may be moved, or mounted elsewhere, with its index
        digest.update(f"\n{os.path.relpath(path, base)} {state}".encode())
    return digest.hexdigest()


def _user_cache(cache: Path) -> Path:
    """Where the counts go when the data folder is read-only."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a container's made-up user has no home
        base = Path(tempfile.gettempdir())
    return base / "svf_lightning" / f"{hashlib.sha256(str(cache.absolute()).encode()).hexdigest()[:16]}.npz"


def load_counts(cache: Path, key: str, shape: tuple[int, int]) -> np.ndarray | None:
    """The counts kept in ``cache``, or in its stand-in in the user's cache; None if they do not fit."""
    for path in (cache, _user_cache(cache)):
        try:
            with np.load(path, allow_pickle=False) as stored:
                pixels = stored["pixels"]
                fits = str(stored["key"]) == key and pixels.shape == shape and pixels.dtype == np.int64
        except FileNotFoundError:
            continue
        except Exception as error:  # zip, zlib, key, value errors: whatever it is, counting again mends it
            log.info("%s cannot be read (%s); counting again", path, error)
            continue
        if fits:
            return pixels
    return None


def save_counts(cache: Path, key: str, pixels: np.ndarray) -> None:
    """Keep counts in ``cache``, or in the user's cache where that cannot be written."""

    def write(path: Path) -> None:
        with path.open("wb") as file:  # given a name, savez would append .npz to it
            np.savez_compressed(file, key=np.array(key), pixels=pixels)

    try:
        replace_file(cache, write)
    except OSError as refused:
        other = _user_cache(cache)
        try:
            replace_file(other, write)
        except OSError:
            log.warning("%s cannot be written (%s): the next start will count again", cache, refused)
