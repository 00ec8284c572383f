import pytest

from svf_lightning.data.folds import CLASS_NAMES, COCO_CLASSES, EMOJI_CLASSES, PASCAL_CLASSES, split_classes

# The published sets: Shaban et al. (BMVC 2017, table 1) for PASCAL-5i, and for COCO-20i the test classes
# that PANet (ICCV 2019) and FWB (ICCV 2019) list.
PASCAL_5I = {
    0: {"aeroplane", "bicycle", "bird", "boat", "bottle"},
    1: {"bus", "car", "cat", "chair", "cow"},
    2: {"diningtable", "dog", "horse", "motorbike", "person"},
    3: {"pottedplant", "sheep", "sofa", "train", "tvmonitor"},
}
COCO_INTERLEAVED = {
    0: "person airplane boat parking_meter dog elephant backpack suitcase sports_ball skateboard wine_glass "
    "spoon sandwich hot_dog chair dining_table mouse microwave refrigerator scissors",
    1: "bicycle bus traffic_light bench horse bear umbrella frisbee kite surfboard cup bowl orange pizza "
    "couch toilet remote oven book teddy_bear",
    2: "car train fire_hydrant bird sheep zebra handbag skis baseball_bat tennis_racket fork banana broccoli "
    "donut potted_plant tv keyboard toaster clock hair_drier",
    3: "motorcycle truck stop_sign cat cow giraffe tie snowboard baseball_glove bottle knife apple carrot "
    "cake bed laptop cell_phone sink vase toothbrush",
}
COCO_CONTIGUOUS_ENDS = {  # first and last class of each fold; by COCO's own ids 1-21, 22-44, 46-65, 67-90
    0: ("person", "cow"),
    1: ("elephant", "bottle"),
    2: ("wine glass", "bed"),
    3: ("dining table", "toothbrush"),
}
EVERY_SPLIT = [("emoji", None), ("pascal", None), ("coco", "interleaved"), ("coco", "contiguous")]


@pytest.mark.parametrize("fold", range(4))
def test_pascal_novel_classes_are_the_published_ones(fold):
    _, novel = split_classes("pascal", fold)

    assert novel == tuple(range(5 * fold + 1, 5 * fold + 6))
    assert {PASCAL_CLASSES[class_id - 1] for class_id in novel} == PASCAL_5I[fold]


@pytest.mark.parametrize("fold", range(4))
def test_coco_interleaved_novel_classes_are_the_published_ones(fold):
    _, novel = split_classes("coco", fold, "interleaved")

    names = [name.replace("_", " ") for name in COCO_INTERLEAVED[fold].split()]
    assert [COCO_CLASSES[class_id - 1] for class_id in novel] == names


@pytest.mark.parametrize("fold", range(4))
def test_coco_contiguous_novel_classes_are_the_published_ones(fold):
    _, novel = split_classes("coco", fold, "contiguous")

    assert novel == tuple(range(20 * fold + 1, 20 * fold + 21))
    assert (COCO_CLASSES[novel[0] - 1], COCO_CLASSES[novel[-1] - 1]) == COCO_CONTIGUOUS_ENDS[fold]


def test_coco_is_interleaved_unless_asked_otherwise():
    assert split_classes("coco", 2) == split_classes("coco", 2, "interleaved")
    assert split_classes("coco", 2) != split_classes("coco", 2, "contiguous")


@pytest.mark.parametrize(("dataset", "convention"), EVERY_SPLIT)
def test_base_and_novel_are_disjoint_ascending_and_complete(dataset, convention):
    ids = list(range(1, len(CLASS_NAMES[dataset]) + 1))
    for fold in range(4):
        base, novel = split_classes(dataset, fold, convention)
        assert sorted(base + novel) == ids
        assert list(base) == sorted(base)
        assert list(novel) == sorted(novel)


@pytest.mark.parametrize(("dataset", "convention"), EVERY_SPLIT)
def test_every_class_is_novel_in_exactly_one_fold(dataset, convention):
    novel = [class_id for fold in range(4) for class_id in split_classes(dataset, fold, convention)[1]]

    assert sorted(novel) == list(range(1, len(CLASS_NAMES[dataset]) + 1))


@pytest.mark.parametrize(("dataset", "count"), [("emoji", 20), ("pascal", 20), ("coco", 80)])
def test_class_names_are_as_many_as_published_and_all_different(dataset, count):
    assert len(CLASS_NAMES[dataset]) == len(set(CLASS_NAMES[dataset])) == count


def test_emoji_classes_are_in_alphabetical_order():
    assert list(EMOJI_CLASSES) == sorted(EMOJI_CLASSES)


@pytest.mark.parametrize("fold", [4, -1, "x", "0", 1.0, True, None])
def test_a_fold_out_of_range_is_refused_by_name(fold):
    with pytest.raises(ValueError, match=r"fold is .*; pascal has folds 0, 1, 2 and 3") as caught:
        split_classes("pascal", fold)
    assert repr(fold) in str(caught.value)


def test_an_unknown_data_set_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="dataset is 'voc'; folds are known for emoji, pascal, coco"):
        split_classes("voc", 0)


def test_an_unknown_convention_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'random'; coco is split interleaved or contiguous"):
        split_classes("coco", 0, "random")
    with pytest.raises(ValueError, match="'interleaved'; pascal is split contiguous"):
        split_classes("pascal", 0, "interleaved")
