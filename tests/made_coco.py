"""Makes tiny data sets in the layout of COCO, for tests: all 80 categories with their official ids."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from svf_lightning.data.folds import COCO_CLASSES

# The ids that the official files leave out of 1..90.
GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
CATEGORY_IDS = [i for i in range(1, 91) if i not in GAPS]


def rectangle(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    """A polygon, as annotations have it; pixels left..right-1 and top..bottom-1 for whole numbers."""
    return [[left, top, right, top, right, bottom, left, bottom]]


def annotation(
    number: int, image_id: int, class_id: int, segmentation: Any, crowd: int = 0
) -> dict[str, Any]:
    """An annotation of an instances file, for the class of this number in 1..80."""
    return {
        "id": number,
        "image_id": image_id,
        "category_id": CATEGORY_IDS[class_id - 1],
        "segmentation": segmentation,
        "area": 1.0,
        "bbox": [0, 0, 1, 1],
        "iscrowd": crowd,
    }


def instances(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of an instances file."""
    categories = [
        {"id": i, "name": name, "supercategory": "thing"}
        for i, name in zip(CATEGORY_IDS, COCO_CLASSES, strict=True)
    ]
    # The official files list them in no particular order.
    return {
        "info": {},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": categories[::-1],
    }


def make_coco(root: Path, year: str = "2014", images: int = 160, side: int = 60) -> dict[str, np.ndarray]:
    """Write ``images`` training and as many test images, with one more of each that shows nothing.

    Image i shows class i % 80 + 1 in the left half and class (i + 40) % 80 + 1 in the right half, which are
    novel in the same interleaved fold, so every class of the fold has images without novel ones.

    Returns:
        The label of every image with objects, by the name of its file without ending.
    """
    rng = np.random.default_rng(0)
    labels = {}
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        folder = root / f"{split}{year}"
        folder.mkdir()
        records, annotations = [], []
        for i in range(images + 1):
            image_id = 9 + 16 * (images - i)  # descending: the list must be sorted
            prefix = f"COCO_{split}2014_" if year == "2014" else ""
            name = f"{prefix}{image_id:012d}"
            records.append({"id": image_id, "file_name": f"{name}.jpg", "height": side, "width": side + 4})
            noise = rng.integers(0, 256, (side, side + 4, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{name}.jpg")
            if i == images:
                continue
            label = np.zeros((side, side + 4), np.uint8)
            half = side // 2
            for left, class_id in ((2, i % 80 + 1), (half + 3, (i + 40) % 80 + 1)):
                box = (left, 5, left + half - 4, side - 5)
                label[box[1] : box[3], box[0] : box[2]] = class_id
                annotations.append(annotation(len(annotations) + 1, image_id, class_id, rectangle(*box)))
            labels[name] = label
        (root / f"annotations/instances_{split}{year}.json").write_text(
            json.dumps(instances(records, annotations))
        )
    return labels
