"""Draw masks over pictures, and many pictures on one contact sheet."""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from svf_lightning.episode import IGNORE
from svf_lightning.files import replace_file

Colour = tuple[int, int, int]

INK, FAINT, PAPER, FRAME = (34, 38, 46), (122, 128, 138), (255, 255, 255), (246, 247, 249)


def class_colour(class_id: int) -> Colour:
    """A strong colour for a class; neighbouring ids get very different ones, and no two the same.

    Example:
        >>> class_colour(1)
        (255, 51, 84)
    """
    # Steps of the golden ratio around the colour wheel never come back to the same place.
    red, green, blue = colorsys.hsv_to_rgb((0.973 + 0.618034 * (class_id - 1)) % 1, 0.8, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def tint(
    image: Image.Image, mask: np.ndarray, colours: Mapping[int, Colour], strength: float = 0.4
) -> Image.Image:
    """A picture with its classes tinted and outlined; ignored pixels turn grey.

    Args:
        image: RGB.
        mask: Class ids and 255, ``(H, W)``, of the image's size.
        colours: Of the classes to show.
        strength: Share of the colour in a tinted pixel, in [0, 1].
    """
    out = np.asarray(image, np.float32).copy()
    line = max(1, round(max(image.size) / 200))
    for class_id, colour in {**colours, IGNORE: (128, 128, 128)}.items():
        area = mask == class_id
        if not area.any():
            continue
        out[area] = (1 - strength) * out[area] + strength * np.asarray(colour, np.float32)
        inner = Image.fromarray(area).convert("L").filter(ImageFilter.MinFilter(2 * line + 1))
        if class_id != IGNORE:
            out[area & ~np.asarray(inner, bool)] = colour
    return Image.fromarray(out.round().astype(np.uint8))


def add_legend(image: Image.Image, entries: Sequence[tuple[str, Colour]]) -> Image.Image:
    """A picture with the names of its classes on a strip below it; no entries, no strip."""
    if not entries:
        return image
    size = max(11, round(max(image.size) / 40))
    text, gap = _font(size), size // 2
    rows: list[list[tuple[str, Colour, int]]] = [[]]
    for name, colour in entries:
        width = int(text.getlength(name)) + size + 3 * gap
        if rows[-1] and sum(entry[2] for entry in rows[-1]) + width > image.width - gap:
            rows.append([])
        rows[-1].append((name, colour, width))
    height = round(1.5 * size)
    out = Image.new("RGB", (image.width, image.height + gap + height * len(rows)), PAPER)
    out.paste(image)
    pen = ImageDraw.Draw(out)
    for number, row in enumerate(rows):
        left, middle = gap, image.height + gap // 2 + height * number + height // 2
        for name, colour, width in row:
            box = (left, middle - size // 2, left + size, middle + size // 2)
            pen.rounded_rectangle(box, radius=size // 5, fill=colour)
            pen.text((left + size + gap, middle), name, INK, text, anchor="lm")
            left += width
    return out


@dataclass(frozen=True)
class SheetRow:
    """One class on a contact sheet."""

    title: str
    note: str
    pictures: Sequence[tuple[str, Image.Image]]  # caption and picture


def contact_sheet(title: str, note: str, rows: Sequence[SheetRow], path: Path, cell: int = 132) -> None:
    """Draw a PNG with one row of pictures per class.

    Args:
        title: Heading.
        note: A line below it.
        rows: The classes; a row may have no pictures.
        path: The file to write.
        cell: Side of the square that a picture is fitted into, in pixels.
    """
    columns = max((len(row.pictures) for row in rows), default=1)
    margin, gap, label, caption, head = 24, 10, 168, 16, 74
    heights = [cell + caption + gap if row.pictures else 56 for row in rows]
    width = 2 * margin + label + max(3, columns) * (cell + gap) - gap
    sheet = Image.new("RGB", (width, head + sum(heights) + margin - gap), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((margin, 20), _fitting(title, 20, width - 2 * margin), INK, _font(20, bold=True))
    pen.text((margin, 48), _fitting(note, 12, width - 2 * margin), FAINT, _font(12))
    top = head
    for row, height in zip(rows, heights, strict=True):
        pen.text((margin, top + 6), _fitting(row.title, 14, label - gap), INK, _font(14, bold=True))
        for line, text in enumerate(row.note.split("\n")):
            pen.text((margin, top + 28 + 16 * line), text, FAINT, _font(11))
        for column, (words, picture) in enumerate(row.pictures):
            left = margin + label + column * (cell + gap)
            pen.rectangle((left, top, left + cell - 1, top + cell - 1), fill=FRAME)
            shown = picture.copy()
            shown.thumbnail((cell, cell))
            sheet.paste(shown, (left + (cell - shown.width) // 2, top + (cell - shown.height) // 2))
            pen.text((left, top + cell + 3), _fitting(words, 9, cell), FAINT, _font(9))
        top += height
    replace_file(path, lambda part: sheet.save(part, "PNG"))


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib  # for its font, which knows more alphabets than the one of Pillow

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def _fitting(text: str, size: int, width: int) -> str:
    """The end of a text that is too long, as file names differ there."""
    if _font(size).getlength(text) <= width:
        return text
    while text and _font(size).getlength("…" + text) > width:
        text = text[1:]
    return "…" + text
