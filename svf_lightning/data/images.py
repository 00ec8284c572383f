"""Read images and labels from files."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from svf_lightning.errors import DataError, MissingFileError


def read_image(path: str | Path) -> Tensor:
    """Read an image as RGB, whatever it is stored as. A transparency channel is dropped.

    Returns:
        Values 0..255, uint8, shape ``(3, H, W)``.

    Raises:
        MissingFileError: If there is no such file.
        DataError: If it is no image, or cut short.
    """
    return to_tensor(to_rgb(open_image(path)))


def to_tensor(image: Image.Image) -> Tensor:
    """The values of an RGB image, uint8, shape ``(3, H, W)``."""
    return torch.from_numpy(np.array(np.asarray(image).transpose(2, 0, 1), order="C"))  # copies, always


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB.

    Pillow cuts grey values beyond 255 off. Here one channel of more than 8 bits is scaled down: white is the
    largest value of 8, 10, 12, 14 or 16 bits, whichever just holds the brightest pixel (cameras and
    microscopes store 12 bits in files of 16), and 1.0 for floats that stay below it.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.nan_to_num(np.asarray(image, np.float64)).clip(0)
        brightest = values.max(initial=0)
        whites = (2.0**bits - 1 for bits in (8, 10, 12, 14, 16) if brightest < 2**bits)
        white = 1.0 if image.mode == "F" and brightest <= 1 else next(whites, brightest)
        image = Image.fromarray((values / white * 255).round().astype(np.uint8))
    return image.convert("RGB")


def open_image(path: str | Path) -> Image.Image:
    """Open an image and decode all of it.

    Raises:
        MissingFileError: If there is no such file.
        DataError: If it may not be read, is no image, or is cut short.
    """
    try:
        with Image.open(path) as image:
            image.load()  # decodes; the pixels stay when the file is closed
            return image
    except FileNotFoundError:
        remedy = "put it back, or take its line out of the list of images"
        raise MissingFileError.of(path, "is missing", remedy) from None
    except PermissionError:
        found = "may not be read (permission denied)"
        raise DataError.of(path, found, "allow it with `chmod u+r`") from None
    except Image.DecompressionBombError:
        found = f"has over {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
        raise DataError.of(path, found, "shrink it first") from None
    except Exception as error:  # broken files raise OSError, SyntaxError, struct.error, zlib.error, ...
        reason = "not an image" if "cannot identify" in str(error) else str(error) or type(error).__name__
        if Path(path).is_file() and not Path(path).stat().st_size:
            reason = "empty, 0 bytes"
        raise DataError.of(path, f"cannot be decoded ({reason})", "replace it by an intact copy") from error


def decode_label(path: str | Path) -> np.ndarray:
    """Read a label image: class ids, and 255 where the annotation abstains.

    A palette image gives its indices, never its colours.

    Returns:
        Class ids, uint8, shape ``(H, W)``.

    Raises:
        MissingFileError: If there is no such file.
        DataError: If it is no image, cut short, or has more than one channel.
    """
    image = open_image(path)
    if image.mode == "1":  # PNG optimisers store a label of nothing but 0 and 255 with one bit per pixel
        image = image.convert("L")
    if image.mode not in ("L", "P"):
        found = f"has mode {image.mode}, but a label holds one class id per pixel"
        raise DataError.of(path, found, "save it as an 8-bit greyscale or palette PNG")
    return np.array(image)  # (H, W) uint8


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of an image all of which can be decoded."""
    return open_image(path).size


def header_size(path: str | Path) -> tuple[int, int]:
    """Width and height of an image that has a sound header and, if a JPEG, an end.

    Raises:
        MissingFileError: If there is no such file.
        DataError: If it is no image, or a JPEG cut short.
    """
    try:
        with Image.open(path) as image, Path(path).open("rb") as file:
            file.seek(-min(os.stat(path).st_size, 4096), os.SEEK_END)
            # The marker cannot stand inside of compressed data; some files carry a few bytes behind it.
            if image.format != "JPEG" or b"\xff\xd9" in file.read():
                return image.size
    except OSError:
        pass
    return open_image(path).size  # decodes, and says what is wrong
