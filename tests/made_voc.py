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


def make_archives(folder: Path, images: int = 8, height: int = 48, width: int = 64) -> tuple[Path, Path]:
    """Write ``VOCdevkit/VOC2012`` and ``benchmark_RELEASE`` as they lie in VOC's and SBD's own archives.

    ``images`` in VOC train, as many in VOC val, and as many that SBD alone has labels for. SBD also labels
    half of VOC train and of VOC val, as class 1 everywhere, so that one sees whose label was taken. Of its
    own images all but two stand in VOC's Main/train.txt; the two stand in Main/val.txt.

    Returns:
        The folders of VOC (``VOCdevkit``) and SBD (``benchmark_RELEASE``).
    """
    from scipy.io import savemat  # `pip install -e '.[dev]'`

    voc, sbd = folder / "VOCdevkit/VOC2012", folder / "benchmark_RELEASE/dataset"
    places = ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "ImageSets/Main", "Annotations")
    for place in places:
        (voc / place).mkdir(parents=True)
    for place in ("cls", "img", "inst"):
        (sbd / place).mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = {
        "train": [f"2007_{i:06d}" for i in range(images)],
        "val": [f"2008_{i:06d}" for i in range(images)],
        "sbd": [f"2010_{i:06d}" for i in range(images)],
    }
    for group, ids in names.items():
        for i, name in enumerate(ids):
            picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(picture).save(voc / f"JPEGImages/{name}.jpg")
            label = np.zeros((height, width), np.uint8)
            label[4:-4, 4:-4] = 255
            label[5:-5, 5:-5] = i % 20 + 1
            if group != "sbd":
                stored = Image.fromarray(label)
                stored.putpalette(bytes(range(256)) * 3)
                stored.save(voc / f"SegmentationClass/{name}.png")
            if group == "sbd" or i < images // 2:
                label = np.where(label == 255, 0, label) if group == "sbd" else np.ones_like(label)
                fields = {
                    "Segmentation": label,
                    "Boundaries": np.zeros((20, 1), object),
                    "CategoriesPresent": 1,
                }
                savemat(sbd / f"cls/{name}.mat", {"GTcls": fields}, do_compression=True)
                savemat(sbd / f"inst/{name}.mat", {"GTinst": fields}, do_compression=True)
                Image.fromarray(picture).save(sbd / f"img/{name}.jpg")
    lists = {
        voc / "ImageSets/Segmentation/train.txt": names["train"],
        voc / "ImageSets/Segmentation/val.txt": names["val"],
        voc / "ImageSets/Main/train.txt": names["train"] + names["sbd"][:-2],
        voc / "ImageSets/Main/val.txt": names["val"] + names["sbd"][-2:],
        sbd / "train.txt": names["sbd"],
        sbd / "val.txt": names["train"][: images // 2] + names["val"][: images // 2],
    }
    for path, ids in lists.items():
        path.write_text("".join(f"{name}\n" for name in ids))
    return folder / "VOCdevkit", folder / "benchmark_RELEASE"
