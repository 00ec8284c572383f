import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from pycocotools import mask as rle

from svf_lightning.data import coco as coco_module
from svf_lightning.data.coco import Coco, draw_label, read_annotations
from svf_lightning.data.episodes import EpisodeDataset, class_lists
from svf_lightning.data.folds import COCO_CLASSES
from tests.made_coco import CATEGORY_IDS, annotation, instances, make_coco, rectangle

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A prepared made COCO, to be left as it is, and the labels that were annotated."""
    root = tmp_path_factory.mktemp("made") / "coco"
    labels = make_coco(root)
    source = Coco(root, min_pixels=1000)
    source.ensure()
    return source, labels


@pytest.fixture
def fresh(tmp_path):
    """A small made COCO whose labels are not drawn."""
    make_coco(tmp_path, images=6)
    return Coco(tmp_path)


def edit(root, change, split="train"):
    """Rewrite the instances file after ``change(tables)``."""
    path = root / f"annotations/instances_{split}2014.json"
    tables = json.loads(path.read_text())
    change(tables)
    path.write_text(json.dumps(tables))


def drawn(tmp_path, *annotations, height=20, width=30):
    """The label of one image with these annotations."""
    image = {"id": 1, "file_name": "1.jpg", "height": height, "width": width}
    (tmp_path / "one.json").write_text(json.dumps(instances([image], list(annotations))))
    [(image, objects)] = read_annotations(tmp_path / "one.json")
    return draw_label(objects, image["height"], image["width"])


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_image_with_an_object_is_indexed_with_the_label_that_was_annotated(made, split):
    source, labels = made
    index = source.index(split)

    assert list(index.ids) == sorted(name for name in labels if split in name)  # by image id
    for i, name in enumerate(index.ids):
        image, label = index.read(i)
        np.testing.assert_array_equal(label.numpy(), labels[name])
        assert image.shape == (3, *labels[name].shape)
        assert index.pixels[i].tolist() == np.bincount(labels[name].ravel(), minlength=81).tolist()


def test_the_2017_layout_is_read_too(tmp_path):
    labels = make_coco(tmp_path, year="2017", images=6)
    for year in ("2017", 2017):  # Hydra makes a number of data.source.year=2017
        source = Coco(tmp_path, year=year)
        source.ensure()
        index = source.index("val")
        assert index.ids[0] == "000000000025"
        np.testing.assert_array_equal(index.read(0)[1].numpy(), labels["000000000025"])


def test_category_ids_are_renumbered_in_ascending_order(tmp_path):
    # the official file: person is 1, street sign (12) has no annotations, stop sign is 13, toothbrush 90
    assert CATEGORY_IDS[10:13] == [11, 13, 14]
    label = drawn(
        tmp_path,
        {**annotation(1, 1, 1, rectangle(0, 0, 5, 5)), "category_id": 13},
        {**annotation(2, 1, 1, rectangle(10, 10, 15, 15)), "category_id": 90},
    )

    assert set(np.unique(label)) == {0, 12, 80}
    assert COCO_CLASSES[11] == "stop sign"
    assert COCO_CLASSES[79] == "toothbrush"


def test_crowds_are_skipped(tmp_path):
    crowd = {"counts": [100, 200, 300], "size": [20, 30]}
    label = drawn(tmp_path, annotation(1, 1, 5, crowd, crowd=1), annotation(2, 1, 3, rectangle(2, 2, 6, 6)))

    assert set(np.unique(label)) == {0, 3}


def test_an_image_of_nothing_but_a_crowd_is_left_out(fresh):
    def crowd_only(tables):
        first = tables["images"][0]["id"]
        for entry in tables["annotations"]:
            entry["iscrowd"] = int(entry["image_id"] == first)

    before = 6
    edit(fresh.root, crowd_only)
    fresh.ensure()
    assert len(fresh.index("train")) == before - 1
    assert len(fresh.index("val")) == before


def test_a_later_annotation_covers_an_earlier_one(tmp_path):
    first, second = annotation(7, 1, 5, rectangle(0, 0, 10, 10)), annotation(3, 1, 9, rectangle(5, 5, 15, 15))

    assert drawn(tmp_path, first, second)[7, 7] == 9  # later in the file, whatever its id
    assert drawn(tmp_path, second, first)[7, 7] == 5


def test_polygons_in_parts_and_both_kinds_of_run_lengths_are_drawn(tmp_path):
    shape = np.zeros((20, 30), np.uint8)
    shape[3:9, 4:11] = 1
    runs = rle.encode(np.asfortranarray(shape))
    counts = np.diff(np.flatnonzero(np.diff(np.r_[2, shape.ravel(order="F"), 2])))  # by hand: lengths of runs
    plain = {"counts": counts.tolist(), "size": [20, 30]}
    packed = {"counts": runs["counts"].decode(), "size": [20, 30]}
    parts = rectangle(4, 3, 11, 6) + rectangle(4, 6, 11, 9)

    for segmentation in (plain, packed, parts):
        np.testing.assert_array_equal(drawn(tmp_path, annotation(1, 1, 8, segmentation)), 8 * shape)


@pytest.mark.parametrize("convention", ["interleaved", "contiguous"])
@pytest.mark.parametrize("novel_images", ["drop", "background"])
def test_base_and_novel_episodes_share_no_class_in_any_fold(made, convention, novel_images):
    source = Coco(made[0].root, convention=convention, min_pixels=1000)
    tested = []
    for fold in range(4):
        base, novel = source.classes(fold)
        rules = {"min_pixels": source.min_pixels, "novel_images": novel_images}
        lists = class_lists(source.index("train").pixels, base, **rules)
        shown = source.index("train").pixels[lists.any(axis=1)]
        assert lists.any()
        assert bool(shown[:, list(novel)].any()) == (
            novel_images == "background" and convention == "contiguous"
        )
        dataset = EpisodeDataset(
            source.index("val"),
            novel,
            1,
            lambda image, mask, _: (image, mask),
            seed=0,
            fixed=True,
            min_pixels=1000,
        )
        classes = {dataset.draw(0, i).class_id for i in range(len(dataset))}
        assert classes <= set(novel)
        tested += novel
    assert sorted(tested) == list(range(1, 81))


def test_the_smallest_object_that_counts_has_2048_pixels(tmp_path):
    make_coco(tmp_path, images=2, side=100)
    edit(tmp_path, lambda t: t["annotations"][0].update(segmentation=rectangle(0, 0, 64, 32)))
    edit(tmp_path, lambda t: t["annotations"][1].update(segmentation=rectangle(0, 40, 23, 99)))
    source = Coco(tmp_path)
    source.ensure()
    index = source.index("train")
    sizes = sorted(index.pixels[1, 1:][index.pixels[1, 1:] > 0].tolist())

    assert sizes == [23 * 59, 2048]
    listed = class_lists(index.pixels, range(1, 81), min_pixels=source.min_pixels, novel_images="background")
    assert listed[1].sum() == 1


def test_a_second_start_neither_parses_nor_draws(fresh, monkeypatch):
    fresh.ensure()
    monkeypatch.setattr(coco_module, "read_annotations", None)
    monkeypatch.setattr(coco_module, "draw_labels", None)

    pickle.loads(pickle.dumps(fresh)).ensure()
    assert len(fresh.index("train")) == 6


def test_an_interrupted_drawing_goes_on_where_it_stopped(fresh, monkeypatch):
    made = []

    def stopping(objects, height, width):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(1)
        return draw_label(objects, height, width)

    monkeypatch.setattr(coco_module, "draw_label", stopping)
    with pytest.raises(KeyboardInterrupt):
        fresh.ensure()
    assert not (fresh.root / "labels/train2014").exists()
    with pytest.raises(FileNotFoundError, match="the labels are not drawn yet"):
        fresh.index("train")

    again = []
    monkeypatch.setattr(coco_module, "draw_label", lambda *a: again.append(1) or draw_label(*a))
    fresh.ensure()
    assert len(again) == 6 - 4 + 6  # the rest of train, and val
    assert sorted(path.name for path in (fresh.root / "labels").iterdir()) == ["train2014", "val2014"]
    assert len(fresh.index("train")) == 6


def test_an_interrupted_drawing_does_not_go_on_with_other_annotations(fresh, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(coco_module.os, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        fresh.ensure()
    monkeypatch.undo()
    edit(fresh.root, lambda t: t["annotations"][0].update(category_id=CATEGORY_IDS[76]))

    fresh.ensure()
    assert fresh.index("train").pixels[:, 77].sum() > 0


def test_two_jobs_that_draw_at_once_both_end_well(fresh, monkeypatch):
    rename = coco_module.os.rename

    def beaten(partial, folder):
        rename(partial, folder)  # as the other job does, a moment before
        rename(partial, folder)

    monkeypatch.setattr(coco_module.os, "rename", beaten)
    fresh.ensure()
    assert len(fresh.index("train")) == 6


def test_labels_may_lie_elsewhere(fresh, tmp_path):
    source = Coco(fresh.root, labels=tmp_path / "drawn")
    source.ensure()

    assert len(source.index("val")) == 6
    assert not (fresh.root / "labels").exists()


def test_a_full_disk_is_told_and_keeps_what_was_drawn(fresh, monkeypatch):
    replace = coco_module.replace_file
    written = []

    def filling(path, write):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(path)
        replace(path, write)

    monkeypatch.setattr(coco_module, "replace_file", filling)
    with pytest.raises(
        ValueError, match=r"labels cannot be written to .*train2014 \(No space left on device\): make"
    ):
        fresh.ensure()
    assert len(list((fresh.root / "labels").glob("*.partial-*/*.png"))) == 3


def test_a_folder_that_may_not_be_written_is_told(fresh, monkeypatch):
    def refuse(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)  # root, whom CI runs as, may write anywhere
    with pytest.raises(ValueError, match=r"cannot be written .*\(Permission denied\).*data\.source\.labels="):
        fresh.ensure()


def test_what_is_missing_is_listed_with_what_to_fetch(fresh):
    (fresh.root / "annotations/instances_train2014.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no annotations/instances_train2014.json under root=.*Fetch"
    ):
        fresh.ensure()
    with pytest.raises(
        FileNotFoundError, match=r"no annotations/.*2017.json, train2017 under root=.*--year 2017"
    ):
        Coco(fresh.root, year="2017").ensure()


def test_annotations_without_their_images_are_counted(fresh):
    for path in sorted((fresh.root / "val2014").glob("*.jpg"))[-2:]:
        path.unlink()

    with pytest.raises(
        FileNotFoundError, match=r"val2014 lacks 2 of the 6 images that instances_val2014.json"
    ):
        fresh.ensure()


@pytest.mark.parametrize("name", ["../up.jpg", "../../up.jpg", "/up.jpg", "down/../../up.jpg"])
def test_an_image_outside_of_its_folder_is_refused_and_nothing_is_written(fresh, tmp_path, name):
    picture = next(path for path in (fresh.root / "train2014").iterdir())
    shutil.copy(picture, fresh.root / "up.jpg")
    edit(fresh.root, lambda tables: tables["images"][0].update(file_name=name))
    before = set(tmp_path.rglob("*"))

    with pytest.raises(FileNotFoundError, match=f"lacks 1 of the 6 images .*{name} for one"):
        fresh.ensure()
    assert set(tmp_path.rglob("*")) == before


def test_a_truncated_annotation_file_is_named(fresh):
    path = fresh.root / "annotations/instances_train2014.json"
    path.write_text(path.read_text()[:-100])

    with pytest.raises(ValueError, match=r"instances_train2014.json is damaged \(.*: unpack it again"):
        fresh.ensure()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t["annotations"][2].update(category_id=12),
            "annotation 3 has category_id 12, which the file",
        ),
        (
            lambda t: t["annotations"][2].update(image_id=4),
            "annotation 3 has image_id 4, which the file does not",
        ),
        (lambda t: t["annotations"][0].pop("segmentation"), "a record without 'segmentation'"),
        (lambda t: t["images"][0].pop("height"), "a record without 'height'"),
        (lambda t: t.pop("categories"), "is no instances file of COCO"),
        (lambda t: t.update(annotations=[]), "annotates no object in 7 images"),
        (
            lambda t: t["categories"].pop(),
            "has 79 categories, .* for annotations of your own use data=folder",
        ),
        (lambda t: t["categories"][4].update(name="cart"), "has 80 categories, .* but COCO has these 80"),
        (
            lambda t: t["annotations"][0].update(segmentation={"counts": [4, -1], "size": [60, 64]}),
            r"\.jpg: a segmentation of class 1 cannot be drawn",
        ),
        (
            lambda t: t["annotations"][0].update(segmentation={"counts": [9, 11], "size": [4, 5]}),
            r"\.jpg: a segmentation of class 1 cannot be drawn \(it is 5x4 but the image 64x60\)",
        ),
    ],
)
def test_annotations_that_cannot_be_used_are_refused_by_what_is_wrong(fresh, change, message):
    edit(fresh.root, change)

    with pytest.raises(ValueError, match=message) as caught:
        fresh.ensure()
    assert "\n" not in str(caught.value)
    assert not (fresh.root / "labels/train2014").exists()


def test_a_broken_image_is_found_by_the_index(fresh):
    fresh.ensure()
    path = sorted((fresh.root / "train2014").glob("*.jpg"))[2]
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(ValueError, match=rf"{path.name} cannot be decoded"):
        fresh.index("train")


def test_an_image_of_another_size_than_annotated_is_found_by_the_index(fresh):
    fresh.ensure()
    path = sorted((fresh.root / "train2014").glob("*.jpg"))[2]
    Image.new("RGB", (31, 17)).save(path)

    with pytest.raises(ValueError, match=rf"{path.stem}.png is 64x60 but its image {path.name} is 31x17"):
        fresh.index("train")


def test_an_unknown_year_convention_or_split_is_refused(fresh):
    with pytest.raises(ValueError, match="year is '2015'; COCO-20i is drawn from 2014 or 2017"):
        Coco("anywhere", year="2015")
    with pytest.raises(ValueError, match="convention is 'random'; coco is split interleaved or contiguous"):
        Coco("anywhere", convention="random")
    with pytest.raises(ValueError, match="split is 'test'"):
        fresh.index("test")


def test_the_hydra_group_builds_the_module_it_describes():
    run = {"fold": 2, "shot": 5, "seed": 7, "workers": 3, "data_dir": "somewhere", "selection": "last"}
    config = OmegaConf.merge(run, {"data": OmegaConf.load(CONF / "coco.yaml")})
    data = instantiate(config.data, mean=(0.5,) * 3, std=(0.25,) * 3, _convert_="all")

    assert data.source == Coco("somewhere/coco", year="2014", convention="interleaved")
    assert data.roles.test == tuple(range(3, 81, 4))
    assert (data.augment.size, data.augment.scale, data.test_episodes) == (641, [0.8, 1.25], 1000)
