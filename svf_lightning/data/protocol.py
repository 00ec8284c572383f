"""What a score was measured on (its protocol): scores compare only where their protocols agree."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from svf_lightning.data.episodes import EpisodeDataset


@dataclass(frozen=True)
class Protocol:
    """All that decides which episodes are tested and how they are scored; saved with every result.

    Attributes:
        data: The data set.
        edition: Which one: the convention of its folds, its year, the size of a made one.
        fold: Which quarter of the classes is novel, counted from 0.
        novel_classes: Names of the classes under test.
        shot: Support images per episode.
        novel_images: "drop": training left out the images that show a novel class; "background": it did not.
        selection: How the tested weights were chosen: on "novel" classes (the field's habit), on "base"
            classes kept out of training, or "last", not at all.
        image_size: Side of the square that the network gets, in pixels.
        padding: Colour around a letterboxed image: "black" or "mean".
        multiple: What both sides of a letterboxed image are cut to multiples of, in pixels.
        min_pixels: Pixels of its class that a support shows at least, at original resolution.
        episodes: Test episodes per seed.
        seeds: Of the test episodes.
        digests: Per seed a digest of its episodes; equal ones mean the very same episodes.
        resolution: Where prediction and truth are compared; "original" is the image's own, as in PFENet, BAM
            and SVF.
    """

    data: str
    edition: str
    fold: int
    novel_classes: tuple[str, ...]
    shot: int
    novel_images: str
    selection: str
    image_size: int
    padding: str
    multiple: int
    min_pixels: int
    episodes: int
    seeds: tuple[int, ...]
    digests: tuple[str, ...]
    resolution: str = "original"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def describe(protocol: dict[str, Any]) -> str:
    """One line about a protocol that :meth:`Protocol.as_dict` gave, without what differs between folds.

    Two results compare if their lines are equal.

    Example:
        >>> describe({"data": "pascal", "edition": "contiguous folds", "shot": 1, "episodes": 1000,
        ...           "seeds": [0], "image_size": 473, "padding": "black", "multiple": 8,
        ...           "resolution": "original", "min_pixels": 2048, "novel_images": "drop", "selection": "novel"})
        'pascal (contiguous folds), 1 shot, 1000 episodes of seed 0, 473 pixels (multiples of 8) on black, scored at original resolution, supports of 2048 pixels or more, images of novel classes dropped in training, weights chosen on novel classes'
    """  # noqa: E501  (the line is what it is)
    seeds = ", ".join(map(str, protocol["seeds"]))
    kept = {"drop": "dropped", "background": "kept as background"}[protocol["novel_images"]]
    chosen = {
        "novel": "weights chosen on novel classes",
        "base": "weights chosen on base classes kept out of training",
        "last": "last weights, nothing chosen",
    }[protocol["selection"]]
    p = protocol
    return (
        f"{p['data']} ({p['edition']}), {p['shot']} shot, {p['episodes']} episodes of seed {seeds}, "
        f"{p['image_size']} pixels (multiples of {p['multiple']}) on {p['padding']}, scored at "
        f"{p['resolution']} resolution, supports of {p['min_pixels']} pixels or more, images of novel "
        f"classes {kept} in training, {chosen}"
    )


def digest(dataset: EpisodeDataset) -> str:
    """A short fingerprint of fixed episodes: of query, class and supports of each, by name and in order.

    Returns:
        16 hexadecimal digits.
    """
    content = hashlib.sha256()
    for row in episode_rows(dataset):
        content.update(repr(row).encode())
    return content.hexdigest()[:16]


def episode_rows(dataset: EpisodeDataset) -> list[tuple[str, str, tuple[str, ...]]]:
    """Class name, query id and support ids of every episode of a data set with fixed episodes."""
    index, rows = dataset.index, []
    for i in range(len(dataset)):
        query, class_id, supports = dataset.draw(0, i)
        rows.append(
            (index.class_names[class_id - 1], index.ids[query], tuple(index.ids[s] for s in supports))
        )
    return rows
