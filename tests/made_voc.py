"""Makes a tiny data set in the layout of VOC 2012 with the labels of SBD, for tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def make_voc(root: Path, images: int = 6, height: int = 48, width: int = 64) -> dict[str, np.ndarray]:
    """Write ``images`` training and as many test images.

    Image i shows class i + 1 in the left half and class (i + 7) % 20 + 1 in the right half, both as
    rectangles with a line of 255 around them. Training labels are greyscale and the training list names
    both files of a pair; test labels have a palette and the test list gives ids, as VOC's own does.

    Returns:
        The label of every image id, shape ``(height, width)``.
    """
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, 768, dtype=np.uint8).tobytes()
    labels = {}
    for split in ("train", "val"):
        for i in range(images):
            label = np.zeros((height, width), np.uint8)
            middle = width // 2
            for left, class_id in ((2, i % 20 + 1), (middle + 2, (i + 7) % 20 + 1)):
                label[4 : height - 4, left : left + middle - 4] = 255
                label[5 : height - 5, left + 1 : left + middle - 5] = class_id
            name = f"{'2007' if split == 'train' else '2008'}_{i:06d}"
            labels[name] = label
            picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(picture).save(root / f"JPEGImages/{name}.jpg")
            stored = Image.fromarray(label)
            if split == "val":
                stored.putpalette(colours)
            stored.save(root / f"SegmentationClassAug/{name}.png")
    (root / "ImageSets/Segmentation/voc_sbd_merge_noduplicate.txt").write_text(
        "".join(f"JPEGImages/{n}.jpg SegmentationClassAug/{n}.png\n" for n in labels if n[:4] == "2007")
    )
    (root / "ImageSets/Segmentation/val.txt").write_text("".join(f"{n}\n" for n in labels if n[:4] == "2008"))
    return labels
