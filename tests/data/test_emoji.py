import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from svf_lightning.data import emoji as emoji_module
from svf_lightning.data.emoji import MARKER, OBJECTS_PER_IMAGE, Emoji, _classes_of_image, draw

SMALL = {"train_images": 6, "val_images": 4, "image_size": 64}


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "datasets" / "emoji"


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_an_image_is_the_same_whichever_images_are_made_before_it():
    image, label = draw("train", 5, image_size=64)
    for number in (9, 0, 4):
        draw("train", number, image_size=64)
    again, label_again = draw("train", 5, image_size=64)

    assert image.tobytes() == again.tobytes()
    assert label.tobytes() == label_again.tobytes()


def test_an_image_does_not_depend_on_how_many_are_made(root):
    Emoji(root / "few", **SMALL).ensure()
    Emoji(root / "more", **{**SMALL, "train_images": 9, "val_images": 5}).ensure()

    few, more = files(root / "few"), files(root / "more")
    pictures = [name for name in few if name.endswith((".jpg", ".png"))]
    assert len(pictures) == 2 * (6 + 4)
    assert all(few[name] == more[name] for name in pictures)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(root):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        Emoji(root / name, **SMALL, seed=seed).ensure()

    assert files(root / "a") == files(root / "b")
    assert (
        files(root / "a")["JPEGImages/emoji_val_000000.jpg"]
        != files(root / "c")["JPEGImages/emoji_val_000000.jpg"]
    )


def test_train_and_test_images_differ():
    images = [draw(split, number, image_size=64)[0] for split in ("train", "val") for number in range(4)]

    assert len({image.tobytes() for image in images}) == 8


def test_every_object_has_a_line_of_255_around_it():
    for number in range(6):
        label = np.array(draw("val", number)[1])
        padded = np.pad(label, 1, mode="edge")
        for y, x in ((0, 1), (2, 1), (1, 0), (1, 2)):  # neighbours above, below, left, right
            neighbour = padded[y : y + 128, x : x + 128]
            touches = (label != 255) & (neighbour != 255) & (label != neighbour)
            assert not touches.any(), f"two ids touch without a line between them in image {number}"
        share = (label == 255).mean()
        assert 0.005 < share < 0.15, "the line is missing, or not thin"


def test_a_label_lies_on_its_object():
    """Redrawn with objects left out, an image changes only under the label of one, or its line."""
    number = next(n for n in range(10) if len(_classes_of_image("val", n, 0)) == 1)
    image, label = draw("val", number)
    rng = np.random.default_rng([0, 2, number])
    background = emoji_module._background(rng, 128)

    changed = np.array(ImageChops.difference(image, background)).max(axis=2)
    ids = np.array(label)
    assert (changed[ids == 0] == 0).all()
    # a drawing may by chance have a pixel of the background's colour, but hardly more
    assert (changed[(ids > 0) & (ids < 255)] > 0).mean() > 0.97


def test_ten_images_in_a_row_show_every_class_once():
    for start in (0, 50):
        shown = [c for number in range(start, start + 10) for c in _classes_of_image("train", number, 0)]
        assert sorted(shown) == list(range(1, 21))
    counts = [len(_classes_of_image("train", number, 0)) for number in range(10)]
    assert sorted(counts) == sorted(OBJECTS_PER_IMAGE)


def test_every_object_is_visible_enough_to_count(root):
    source = Emoji(root, train_images=1, val_images=30)
    source.ensure()
    index = source.index("val")

    for number in range(30):
        classes = _classes_of_image("val", number, 0)
        shown = index.pixels[number, 1:]
        assert (np.flatnonzero(shown) + 1).tolist() == sorted(classes)
        assert shown[shown > 0].min() >= source.min_pixels


def test_min_pixels_have_the_share_of_an_image_that_2048_have_in_voc():
    assert Emoji("anywhere", image_size=128).min_pixels == 179  # 2048 / (500 * 375) * 128 * 128 = 178.96


def test_the_index_reads_what_was_drawn(root):
    source = Emoji(root, **SMALL)
    source.ensure()
    index = source.index("train")

    assert index.ids[5] == "emoji_train_000005"
    image, label = index.read(5)
    drawn_image, drawn_label = draw("train", 5, image_size=64)
    assert label.tolist() == np.array(drawn_label).tolist()
    # JPEG at quality 95 changes a pixel by a few levels, a wrong image by tens
    assert abs(image.numpy().astype(float) - np.array(drawn_image).transpose(2, 0, 1)).mean() < 6


def test_viewers_show_labels_in_voc_colours(root):
    Emoji(root, **SMALL).ensure()

    with Image.open(root / "SegmentationClassAug/emoji_val_000000.png") as label:
        assert label.mode == "P"
        assert label.getpalette()[3:6] == [128, 0, 0]


def test_licences_travel_with_the_images(root):
    Emoji(root, **SMALL).ensure()

    assert "CC-BY-4.0" in (root / "LICENSES.md").read_text()


def test_a_second_prepare_changes_nothing(root):
    Emoji(root, **SMALL).ensure()
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    Emoji(root, **SMALL).ensure()

    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_an_empty_folder_may_be_the_root(root):
    root.mkdir(parents=True)
    Emoji(root, **SMALL).ensure()

    assert (root / MARKER).is_file()


def test_an_interrupted_making_leaves_nothing_and_the_next_start_makes_it_whole(root, monkeypatch):
    def interrupted(split, number, **settings):
        if (split, number) == ("val", 1):
            raise KeyboardInterrupt
        return draw(split, number, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(emoji_module, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Emoji(root, **SMALL).ensure()
    assert list(root.parent.iterdir()) == []

    Emoji(root, **SMALL).ensure()
    assert len(list((root / "JPEGImages").iterdir())) == 10


def test_what_a_killed_job_left_behind_is_not_taken_for_a_set(root):
    left = root.with_name("emoji.partial-0123abcd")
    (left / "JPEGImages").mkdir(parents=True)

    Emoji(root, **SMALL).ensure()
    assert len(Emoji(root, **SMALL).index("train")) == 6


def test_jobs_that_start_together_end_with_one_whole_set(root):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: Emoji(root, **SMALL).ensure(), range(4)))

    assert [path.name for path in root.parent.iterdir()] == ["emoji"]
    assert len(Emoji(root, **SMALL).index("train")) == 6


def test_a_set_of_other_settings_is_refused_with_the_difference(root):
    Emoji(root, **SMALL).ensure()

    with pytest.raises(ValueError, match=r"made with train_images 6 instead of 7, seed 0 instead of 1: name"):
        Emoji(root, **{**SMALL, "train_images": 7}, seed=1).ensure()


def test_a_set_of_an_older_generator_is_refused(root, monkeypatch):
    Emoji(root, **SMALL).ensure()
    monkeypatch.setattr(emoji_module, "GENERATOR", 99)

    with pytest.raises(ValueError, match="made with generator 1 instead of 99"):
        Emoji(root, **SMALL).ensure()


def test_a_folder_of_something_else_is_refused_and_kept(root):
    root.mkdir(parents=True)
    (root / "thesis.tex").write_text("years of work")

    with pytest.raises(ValueError, match="exists but holds no emoji images"):
        Emoji(root, **SMALL).ensure()
    assert (root / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("content", ["", "[]", json.dumps({"generator": 1})[:-3]])
def test_a_damaged_marker_is_refused(root, content):
    root.mkdir(parents=True)
    (root / MARKER).write_text(content)

    with pytest.raises(ValueError, match=r"emoji\.json is damaged: delete"):
        Emoji(root, **SMALL).ensure()


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(ValueError, match=r"cannot be written to root=.*file/emoji .*name another root"):
        Emoji(tmp_path / "file" / "emoji", **SMALL).ensure()


def test_an_index_before_ensure_is_refused(root):
    with pytest.raises(FileNotFoundError, match=r"no emoji images under root=.*call ensure\(\) first"):
        Emoji(root, **SMALL).index("train")


def test_an_unknown_split_is_refused(root):
    with pytest.raises(ValueError, match="split is 'test'"):
        Emoji(root, **SMALL).index("test")


@pytest.mark.parametrize(
    ("argument", "value"),
    [("train_images", 0), ("val_images", "many"), ("image_size", 31), ("seed", -1), ("image_size", 64.0)],
)
def test_a_number_out_of_range_is_refused_by_name(argument, value):
    with pytest.raises(ValueError, match=f"{argument} is {value!r}; it must be a whole number of at least"):
        Emoji("anywhere", **{argument: value})


def test_a_source_can_be_pickled(root):
    assert pickle.loads(pickle.dumps(Emoji(root, **SMALL))) == Emoji(root, **SMALL)
