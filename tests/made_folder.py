"""Draws a small collection of "photos" and masks, as different people would have stored them.

python -m tests.made_folder my_photos [--layout folders|indexed|coco] [--images 8] [--size 160]
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("arrow", "crescent", "cross", "gear", "leaf", "star")
TURNED_RIGHT = 6  # EXIF orientation: turn the stored picture by 90 degrees clockwise to display it


def make_folder(
    root: Path, layout: str = "folders", images: int = 8, size: int = 160, plain: bool = False
) -> None:
    """Write ``images`` pictures of each class in one of the three layouts of `Folder`.

    Unless ``plain``, the pictures are stored in all kinds of ways: grey, RGBA, palette, 16 bits, turned by
    EXIF, in sub-folders, with endings and names of all sorts; masks as 0/1, 0/255, colours, palettes, 16 bits
    and soft greys.
    """
    names: list[str] = []
    coco: dict[str, list[dict]] = {"images": [], "annotations": [], "categories": []}
    for class_id, name in enumerate(CLASSES, start=1):
        coco["categories"].append({"id": 10 * class_id, "name": name})
        for number in range(images):
            picture, outline = draw(class_id, number, size)
            mask = Image.new("L", picture.size)
            ImageDraw.Draw(mask).polygon(outline, fill=255)
            if layout == "folders":
                way = 0 if plain else number
                _save_image(picture, root / "images" / name / f"{name}_{number}", way)
                _save_mask(mask, root / "masks" / name / f"{name}_{number}", way)
                continue
            file = f"{name}_{number}.jpg"
            names.append(file)
            (root / "images").mkdir(parents=True, exist_ok=True)
            picture.save(root / "images" / file, quality=92)
            if layout == "indexed":
                (root / "masks").mkdir(exist_ok=True)
                label = mask.point(lambda value, class_id=class_id: class_id * (value > 0))
                label.save(root / "masks" / f"{name}_{number}.png")
            else:
                record = {
                    "id": len(names),
                    "file_name": file,
                    "width": picture.width,
                    "height": picture.height,
                }
                coco["images"].append(record)
                polygon = [float(value) for point in outline for value in point]
                annotation = {"id": len(names), "image_id": len(names), "category_id": 10 * class_id}
                annotation |= {
                    "segmentation": [polygon],
                    "iscrowd": 0,
                    "area": float(np.asarray(mask).sum() / 255),
                }
                coco["annotations"].append(annotation)
    if layout == "indexed":
        (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    if layout == "coco":
        (root / "annotations.json").write_text(json.dumps(coco))


def draw(class_id: int, number: int, size: int = 160) -> tuple[Image.Image, list[tuple[float, float]]]:
    """A picture of one object, and the object's outline."""
    rng = np.random.default_rng([class_id, number])
    width, height = (size, round(0.75 * size)) if number % 2 else (round(0.75 * size), size)
    low, high = rng.uniform(60, 200, 3), rng.uniform(60, 200, 3)
    ramp = (
        np.linspace(0, 1, width)[None, :, None] * rng.uniform(0.3, 1)
        + np.linspace(0, 1, height)[:, None, None]
    )
    grain = rng.normal(0, 8, (height, width, 1))
    ground = low + (high - low) * ramp / ramp.max() + grain
    picture = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    radius = rng.uniform(0.22, 0.36) * min(width, height)
    middle = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
    angle = rng.uniform(-0.5, 0.5)
    outline = [
        (
            middle[0] + radius * (x * math.cos(angle) - y * math.sin(angle)),
            middle[1] + radius * (x * math.sin(angle) + y * math.cos(angle)),
        )
        for x, y in _shape(CLASSES[class_id - 1])
    ]
    colour = tuple(int(value) for value in rng.integers(0, 256, 3))
    light = [(x - 0.08 * radius, y - 0.08 * radius) for x, y in outline]
    pen = ImageDraw.Draw(picture)
    pen.polygon(outline, fill=colour, outline=tuple(value // 3 for value in colour))
    centre = np.mean(light, axis=0)
    if CLASSES[class_id - 1] == "crescent":  # its middle lies outside
        return picture, outline
    inner = [tuple(centre + 0.5 * (np.asarray(point) - centre)) for point in light]
    pen.polygon(inner, fill=tuple(min(255, value + 40) for value in colour))
    return picture, outline


def _shape(name: str) -> list[tuple[float, float]]:
    """A closed outline within the unit circle."""
    circle = np.linspace(0, 2 * math.pi, 49)[:-1]
    if name == "star":
        return [
            ((1, 0.42)[i % 2] * math.sin(i * math.pi / 5), -(1, 0.42)[i % 2] * math.cos(i * math.pi / 5))
            for i in range(10)
        ]
    if name == "gear":
        return [
            ((0.78 + 0.2 * (i // 3 % 2)) * math.cos(t), (0.78 + 0.2 * (i // 3 % 2)) * math.sin(t))
            for i, t in enumerate(circle)
        ]
    if name == "cross":
        a = 0.33
        return [
            (-a, -1),
            (a, -1),
            (a, -a),
            (1, -a),
            (1, a),
            (a, a),
            (a, 1),
            (-a, 1),
            (-a, a),
            (-1, a),
            (-1, -a),
            (-a, -a),
        ]
    if name == "arrow":
        return [(-0.25, 1), (0.25, 1), (0.25, 0), (0.7, 0), (0, -1), (-0.7, 0), (-0.25, 0)]
    if name == "leaf":
        upper = [(0.5 * math.sin(math.pi * t) ** 1.2, -1 + 2 * t) for t in np.linspace(0, 1, 20)]
        return upper + [(-x, y) for x, y in reversed(upper)]
    outer = [(math.cos(t), math.sin(t)) for t in np.linspace(0.9, 2 * math.pi - 0.9, 30)]  # crescent
    inner = [(0.45 + 0.72 * math.cos(t), 0.85 * math.sin(t)) for t in np.linspace(2 * math.pi - 1.5, 1.5, 30)]
    return outer + inner


def _save_image(image: Image.Image, path: Path, way: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    match way % 8:
        case 0:
            image.save(path.with_suffix(".jpg"), quality=92)
        case 1:
            alpha = Image.new("L", image.size, 255)
            Image.merge("RGBA", (*image.split(), alpha)).save(path.with_suffix(".PNG"))
        case 2:
            image.convert("L").save(path.with_suffix(".jpeg"))
        case 3:
            (path.parent / "from phone").mkdir(exist_ok=True)
            exif = Image.Exif()
            exif[0x0112] = TURNED_RIGHT
            stored = image.transpose(Image.Transpose.ROTATE_90)
            stored.save(path.parent / "from phone" / f"{path.name}.JPG", exif=exif, quality=92)
        case 4:
            grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
            Image.fromarray(grey).save(path.with_suffix(".tif"))
        case 5:
            image.quantize(64).save(path.with_suffix(".gif"))
        case 6:
            image.save(path.with_suffix(".webp"), quality=90)
        case 7:
            image.save(path.with_name(f"{path.name} größer 图.png"))


def _save_mask(mask: Image.Image, path: Path, way: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ones = np.asarray(mask) // 255
    match way % 8:
        case 0:
            mask.save(path.with_suffix(".png"))
        case 1:
            Image.fromarray(ones).save(path.with_suffix(".png"))
        case 2:
            mask.convert("1").save(path.with_name(f"{path.name}_mask.png"))
        case 3:  # drawn on the picture as displayed
            (path.parent / "from phone").mkdir(exist_ok=True)
            mask.save(path.parent / "from phone" / f"{path.name}.JPG.png")
        case 4:
            Image.fromarray(ones.astype(np.uint16) * 65535).save(path.with_suffix(".tif"))
        case 5:
            label = Image.fromarray(ones)
            label.putpalette([0, 0, 0, 128, 0, 0])
            label.save(path.with_suffix(".png"))
        case 6:
            Image.fromarray(ones[..., None] * np.array([255, 0, 0], np.uint8)).save(path.with_suffix(".bmp"))
        case 7:
            white = Image.new("L", mask.size, 255)
            Image.merge("LA", (white, mask)).save(path.with_name(f"{path.name} größer 图.png"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--layout", default="folders", choices=("folders", "indexed", "coco"))
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=160)
    options = parser.parse_args()
    make_folder(options.root, options.layout, options.images, options.size)
