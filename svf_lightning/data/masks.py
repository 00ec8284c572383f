"""Turn the masks that people draw into 0, 1 and 255, turned the way that their picture is shown.

Tools store one and the same mask as 0/1, 0/255, white, red or transparent, in 1, 8, 16 or 32 bits, with a
palette or without. Here all of them become the mask values of this package: 0 background, 1 the class,
255 ignored.
"""

import numpy as np
from PIL import Image, ImageOps

from svf_lightning.episode import FOREGROUND, IGNORE
from svf_lightning.errors import DataError

THE_MASK = "the mask"  # what errors here are about; whoever knows its file puts that instead


def drawn_mask(image: Image.Image) -> np.ndarray:
    """The mask of one class, from an image in which somebody marked the class in any usual way.

    - Where some of it is transparent, whatever is opaque is the class, and colours say nothing.
    - Otherwise black is background. A colour counts by its largest channel, a palette entry by its number
      (by its grey, if all entries in use are grey).
    - Of two values the larger one is the class: 0 and 1, 0 and 255, 0 and 65535, black and red.
    - Of exactly 0, 1 and 255, 1 is the class and 255 is ignored, as everywhere in this package.
    - More values are shades of a soft border, and what is above half of the largest one is the class.

    Args:
        image: Any mode.

    Returns:
        Values 0, 1 and 255, uint8, shape ``(H, W)``.

    Raises:
        DataError: If the values look like class ids, or several colours are in use.

    Example:
        >>> drawn_mask(Image.fromarray(np.array([[0, 200, 255, 90]], np.uint8)))
        array([[0, 1, 1, 0]], dtype=uint8)
    """
    levels = _levels(image)
    values = np.unique(levels)
    if set(values.tolist()) == {0, FOREGROUND, IGNORE}:
        return levels.astype(np.uint8)
    largest = values[-1]
    if largest <= 0:
        return np.zeros(levels.shape, np.uint8)
    shades = len(values) > 2 or (len(values) == 2 and values[0] > 0)
    if shades and 1 < largest < 128:
        raise DataError.of(
            THE_MASK,
            f"holds the values {_list(values)}, which look like class ids, but this is the mask of one class",
            "draw the class white on black, or use the layout with classes.txt",
        )
    return (levels > largest / 2).astype(np.uint8)


def class_ids(image: Image.Image) -> np.ndarray:
    """The class ids of a label image: grey values, or the indices (never the colours) of a palette.

    Returns:
        Ids as stored, 255 where the label abstains; uint8, shape ``(H, W)``.

    Raises:
        DataError: If it shows colours, or ids above 255.
    """
    if image.mode in ("L", "P"):
        return np.array(image)
    if image.mode == "1":
        return np.array(image, np.uint8)
    if image.mode.startswith("I"):
        ids = np.asarray(image)
        if ids.min(initial=0) < 0 or ids.max(initial=0) > 255:
            raise DataError.of(THE_MASK, f"holds ids up to {ids.max()}, but ids end at 255", "renumber it")
        return ids.astype(np.uint8)
    colours = np.asarray(image.convert("RGB"))  # (H, W, 3)
    if (colours != colours[..., :1]).any():
        found = f"shows colours (mode {image.mode}), but a label holds one class id per pixel"
        raise DataError.of(THE_MASK, found, "save it as an 8-bit greyscale or palette PNG")
    return colours[..., 0].copy()


def displayed(image: Image.Image) -> Image.Image:
    """An image as viewers show it: turned as its EXIF tag says."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken tag raises anything from SyntaxError to struct.error; viewers skip it
        return image


def align(image: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Image and mask the same way round, where an EXIF tag turns one of them.

    Most tools draw on the picture as displayed, some on the picture as stored, and some copy the tag into
    the mask. The first of these readings in which both have one size is taken.

    Raises:
        DataError: If they agree in none.
    """
    for turned in (displayed(image), image):
        for drawn in (displayed(mask), mask):
            if turned.size == drawn.size:
                return turned, drawn
    (width, height), (mask_width, mask_height) = displayed(image).size, mask.size
    found = f"is {mask_width}x{mask_height} but its image is {width}x{height} (width x height)"
    raise DataError.of(THE_MASK, found, "export the mask at the size of its image")


def shrink(image: Image.Image, label: np.ndarray, long_side: int | None) -> tuple[Image.Image, np.ndarray]:
    """Image and label with no side longer than ``long_side``: averaged, and nearest. None changes nothing."""
    if long_side is None or max(image.size) <= long_side:
        return image, label
    width, height = (max(1, round(side * long_side / max(image.size))) for side in image.size)
    small = Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST)
    return image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0), np.array(small)


def _levels(image: Image.Image) -> np.ndarray:
    """One number per pixel, 0 where nothing is drawn, shape ``(H, W)``."""
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        if alpha.min() < 128 <= alpha.max():
            return (alpha >= 128).astype(np.uint8)
    if image.mode == "P":
        entries = np.asarray(image.getpalette("RGB")).reshape(-1, 3)  # (entries, 3)
        indices = np.asarray(image)
        used = entries[np.unique(indices[indices < len(entries)])]
        if (used != used[:, :1]).any() and not entries[0].any():
            return indices
    if image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        return np.nan_to_num(np.asarray(image)) if image.mode != "1" else np.asarray(image, np.uint8)
    colours = np.asarray(image.convert("RGB"))
    brightest: np.ndarray = colours.max(axis=-1)
    _refuse_several_colours(colours, brightest)
    return brightest


def _refuse_several_colours(colours: np.ndarray, brightest: np.ndarray) -> None:
    drawn = brightest > brightest.max() / 2
    # Which channels are strong, as a number of three bits: equal for all shades of one colour.
    hues = (colours > brightest[..., None] / 2) @ np.array([4, 2, 1])
    counts = np.bincount(hues[drawn], minlength=8)
    if drawn.any() and (several := int((counts > 0.02 * drawn.sum()).sum())) > 1:
        found = f"shows {several} colours, but this is the mask of one class"
        raise DataError.of(THE_MASK, found, "draw the class white on black")


def _list(values: np.ndarray) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:6])
    return shown if len(values) <= 6 else f"{shown} and {len(values) - 6} more"
