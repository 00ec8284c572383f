"""Base and novel classes of every data set and fold.

A data set's classes have ids ``1..N`` in the order of the tuples below; 0 is background and 255 ignored.
A fold makes a quarter of them novel (met in the test only) and leaves the rest as base classes.

Sources: PASCAL-5i is Shaban et al., One-Shot Learning for Semantic Segmentation, BMVC 2017. COCO-20i comes
in two conventions whose results cannot be compared: Nguyen and Todorovic, Feature Weighting and Boosting,
ICCV 2019 ("interleaved"), and Wang et al., PANet, ICCV 2019 ("contiguous").
"""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import NamedTuple

FOLDS = 4

SELECTIONS = ("novel", "base", "last")  # how a run chooses the weights that it tests

PASCAL_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle"),
    *("bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person"),
    *("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

EMOJI_CLASSES = (
    *("airplane", "bird", "boat", "bottle", "bus"),
    *("cake", "car", "cat", "chair", "cow"),
    *("dog", "fish", "flower", "fruit", "horse"),
    *("motorbike", "plant", "sheep", "train", "tv"),
)

# COCO's category ids run to 90 with ten gaps; here they are renumbered 1..80 in ascending order.
COCO_CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    *("traffic light", "fire hydrant", "stop sign", "parking meter", "bench"),
    *("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    *("backpack", "umbrella", "handbag", "tie", "suitcase"),
    *("frisbee", "skis", "snowboard", "sports ball", "kite"),
    *("baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket"),
    *("bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl"),
    *("banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake"),
    *("chair", "couch", "potted plant", "bed", "dining table", "toilet"),
    *("tv", "laptop", "mouse", "remote", "keyboard", "cell phone"),
    *("microwave", "oven", "toaster", "sink", "refrigerator"),
    *("book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)

CLASS_NAMES = {"emoji": EMOJI_CLASSES, "pascal": PASCAL_CLASSES, "coco": COCO_CLASSES}

# The conventions in use, the usual one first. "contiguous": a fold is one run of neighbouring ids.
# "interleaved": a fold is every fourth id.
CONVENTIONS = {
    "emoji": ("contiguous",),
    "pascal": ("contiguous",),
    "coco": ("interleaved", "contiguous"),
}


def split_classes(
    dataset: str, fold: int, convention: str | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Base and novel class ids of one fold.

    The only place that checks the range of ``fold``.

    Args:
        dataset: ``"emoji"``, ``"pascal"`` or ``"coco"``.
        fold: 0, 1, 2 or 3.
        convention: ``"interleaved"`` or ``"contiguous"``, a choice for COCO alone. None takes the data
            set's usual one: interleaved for COCO, contiguous for the others.

    Returns:
        Base ids and novel ids, each ascending and counted from 1; together they are all ids.

    Raises:
        ValueError: If an argument is none of those.

    Example:
        >>> base, novel = split_classes("pascal", fold=0)
        >>> novel
        (1, 2, 3, 4, 5)
        >>> split_classes("coco", fold=1)[1][:3]
        (2, 6, 10)
    """
    if dataset not in CLASS_NAMES:
        raise ValueError(f"dataset is {dataset!r}; folds are known for {', '.join(CLASS_NAMES)}")
    check_fold(dataset, fold, FOLDS)
    allowed = CONVENTIONS[dataset]
    if convention is not None and convention not in allowed:
        raise ValueError(f"convention is {convention!r}; {dataset} is split {' or '.join(allowed)}")

    ids = range(1, len(CLASS_NAMES[dataset]) + 1)
    if (convention or allowed[0]) == "interleaved":
        novel = tuple(ids[fold::FOLDS])
    else:
        size = len(ids) // FOLDS
        novel = tuple(ids[fold * size : (fold + 1) * size])
    base = tuple(class_id for class_id in ids if class_id not in novel)
    return base, novel


class Roles(NamedTuple):
    """Class ids by what a run does with them; test classes are never trained on."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def class_roles(base: Sequence[int], novel: Sequence[int], selection: str) -> Roles:
    """Which classes train, which validate and which are tested, by how the tested weights are chosen.

    The protocol has no validation classes: the field chooses the checkpoint by the novel classes that it then
    reports ("novel"), which flatters. "base" keeps every fifth base class out of training to choose by (one
    at least), spread over the data set's order, so that no look at a novel class is needed. "last" chooses
    nothing; its validation only draws a curve.

    Args:
        base: Base class ids of the fold, ascending.
        novel: Novel class ids of the fold.
        selection: "novel", "base" or "last".

    Raises:
        ValueError: If ``selection`` is none of those, or there is but one base class to divide.

    Example:
        >>> class_roles(range(6, 21), range(1, 6), "base")[:2]
        ((6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 19, 20), (8, 13, 18))
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be {', '.join(map(repr, SELECTIONS))}, got {selection!r}")
    if selection != "base":
        return Roles(tuple(base), tuple(novel), tuple(novel))
    if len(base) < 2:
        raise ValueError(
            "selection=base keeps base classes out of training to choose the weights by, but there is only "
            "one base class; use selection=last"
        )
    held_out = tuple(base[2::5]) or (base[-1],)
    return Roles(tuple(c for c in base if c not in held_out), held_out, tuple(novel))


def check_fold(dataset: str, fold: object, folds: int) -> None:
    """Refuse a fold that a data set of so many folds does not have.

    Raises:
        ValueError: If ``fold`` is not one of 0 .. ``folds`` - 1.
    """
    if type(fold) is not int or not 0 <= fold < folds:  # not isinstance: True would be fold 1
        *others, last = map(str, range(folds))
        known = f"folds {', '.join(others)} and {last}" if others else "one split only: use fold=0"
        raise ValueError(f"fold is {fold!r}; {dataset} has {known}")


def split_own_classes(
    names: Sequence[str], fold: int, *, novel: Sequence[str] | None = None, folds: int | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Base and novel class ids of a user's own classes.

    Args:
        names: Of the classes 1..N.
        fold: Which part is novel, counted from 0; 0 where ``novel`` says it.
        novel: Names of the novel classes; None makes ``folds`` parts of neighbouring ids, whose sizes differ
            by one at most, and ``fold`` chooses.
        folds: Number of parts; None takes four, or one per class if there are fewer.

    Returns:
        Base ids and novel ids, each ascending and counted from 1; neither is empty.

    Raises:
        ValueError: If there is but one class, a name is unknown, no class stays base, or a number is out of
            range.

    Example:
        >>> split_own_classes(["bee", "cat", "dog", "elk", "fox"], fold=1, folds=2)
        ((1, 2), (3, 4, 5))
        >>> split_own_classes(["bee", "cat", "dog"], fold=0, novel=["cat"])
        ((1, 3), (2,))
    """
    if len(names) < 2:
        raise ValueError(
            f"training needs two classes or more, some to learn from and some to test; there is only "
            f"{', '.join(names) or 'none'}. `svf predict` segments a class without training"
        )
    ids = range(1, len(names) + 1)
    if novel is not None:
        unknown = [name for name in novel if name not in names]
        if unknown or not novel:
            similar = get_close_matches(unknown[0], names, n=1, cutoff=0.5) if unknown else []
            hint = f" (did you mean {similar[0]}?)" if similar else ""
            raise ValueError(f"novel is {list(novel)}{hint}; name some of the classes {', '.join(names)}")
        if set(novel) == set(names):
            raise ValueError(f"novel is {list(novel)}, which is every class: leave some to learn from")
        if type(fold) is not int or fold != 0:
            raise ValueError(f"fold is {fold!r}, but novel={list(novel)} makes one split: use fold=0")
        tested = tuple(i for i in ids if names[i - 1] in novel)
    else:
        folds = min(FOLDS, len(names)) if folds is None else folds
        if type(folds) is not int or not 2 <= folds <= len(names):
            raise ValueError(f"folds is {folds!r}; {len(names)} classes make 2 to {len(names)} folds")
        if type(fold) is not int or not 0 <= fold < folds:
            raise ValueError(f"fold is {fold!r}; {len(names)} own classes have folds 0 to {folds - 1}")
        tested = tuple(ids[fold * len(names) // folds : (fold + 1) * len(names) // folds])
    return tuple(i for i in ids if i not in tested), tested
