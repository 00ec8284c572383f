"""Base and novel classes of every data set and fold.

A data set's classes have ids ``1..N`` in the order of the tuples below; 0 is background and 255 ignored.
A fold makes a quarter of them novel (met in the test only) and leaves the rest as base classes.

Sources: PASCAL-5i is Shaban et al., One-Shot Learning for Semantic Segmentation, BMVC 2017. COCO-20i comes
in two conventions whose results cannot be compared: Nguyen and Todorovic, Feature Weighting and Boosting,
ICCV 2019 ("interleaved"), and Wang et al., PANet, ICCV 2019 ("contiguous").
"""

FOLDS = 4

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
    if type(fold) is not int or not 0 <= fold < FOLDS:  # not isinstance: True would be fold 1
        raise ValueError(f"fold is {fold!r}; {dataset} has folds 0, 1, 2 and 3")
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
