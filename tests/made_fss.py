"""Makes a tiny data set in the layout of FSS-1000 with HSNet's class lists, for tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def make_fss(root: Path, train: int = 5, val: int = 2, test: int = 3, side: int = 48) -> dict[str, list[str]]:
    """Write ten images of every class: a disc whose radius is 9 plus the image's number, counted from 1.

    Masks are RGB with the grey values around the threshold that JPEG masters of them would have.

    Returns:
        The classes of every list.
    """
    rng = np.random.default_rng(0)
    names = [f"class_{i:03d}" for i in range(train + val + test)]
    order = rng.permutation(len(names)).tolist()  # alphabetical order must not give the lists away
    lists = {
        "trn": [names[i] for i in order[:train]],
        "val": [names[i] for i in order[train : train + val]],
        "test": [names[i] for i in order[train + val :]],
    }
    y, x = np.mgrid[:side, :side] - side // 2
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(1, 11):
            disc = x**2 + y**2 < (9 + number) ** 2
            mask = np.where(disc, 128, 127).astype(np.uint8)
            Image.fromarray(np.stack([mask] * 3, axis=-1)).save(root / name / f"{number}.png")
            picture = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(picture).save(root / name / f"{number}.jpg")
    (root / "splits/fss").mkdir(parents=True)
    for key, classes in lists.items():
        (root / f"splits/fss/{key}.txt").write_text("".join(f"{name}\n" for name in classes))
    return lists
