"""The user's own images: three layouts, odd names and files, folds, splits."""

import json
import os
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from svf_lightning.data import folder as folder_module
from svf_lightning.data.episodes import EpisodeDataset
from svf_lightning.data.folder import Folder
from svf_lightning.data.folder_layouts import list_folder, read_names
from svf_lightning.data.folds import split_own_classes
from svf_lightning.objects import build_object
from tests.made_folder import CLASSES, make_folder

CONF = Path(__file__).parents[2] / "conf"
LAYOUTS = ("folders", "indexed", "coco")


@pytest.fixture(autouse=True)
def _own_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))


def write(path: Path, pixels: np.ndarray | None = None, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels is None:
        pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def mask_of(height: int = 8, width: int = 10, value: int = 255) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[2:4, 3:8] = value  # ten pixels
    return mask


def luminance(image: torch.Tensor) -> torch.Tensor:
    return torch.einsum("chw,c->hw", image.float(), torch.tensor([0.299, 0.587, 0.114]))


def pair(root: Path, name: str, image: str = ".jpg", mask: str = ".png", value: int = 255) -> None:
    write(root / "images" / f"{name}{image}")
    write(root / "masks" / f"{name}{mask}", mask_of(value=value), "L")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_recognised_and_read(layout, tmp_path):
    make_folder(tmp_path, layout, images=2, size=48, plain=True)

    source = Folder(tmp_path)
    source.ensure()
    index = source.index("train")
    assert source.listing.layout == layout
    assert source.class_names == CLASSES
    assert not source.listing.problems
    assert len(index) == 12
    assert index.pixels.astype(bool)[:, 1:].sum(axis=0).tolist() == [2] * 6
    for position in range(12):
        image, label = index.read(position)
        assert image.shape[1:] == label.shape
        assert image.dtype == label.dtype == torch.uint8
        counts = np.bincount(label.flatten().numpy(), minlength=7)
        assert counts.tolist() == index.pixels[position].tolist()


def test_the_layouts_hold_the_same_objects(tmp_path):
    shares = {}
    for layout in LAYOUTS:
        make_folder(tmp_path / layout, layout, images=2, size=96, plain=True)
        pixels = Folder(tmp_path / layout).index("val").pixels
        shares[layout] = pixels[:, 1:].sum(axis=1)

    assert shares["folders"].tolist() == shares["indexed"].tolist()
    # Polygons are filled by another program, which counts the pixels of an outline by other rules.
    assert np.abs(shares["coco"] / shares["folders"] - 1).max() < 0.15


def test_every_odd_way_of_storing_a_picture_is_read(tmp_path):
    make_folder(tmp_path / "odd", images=8, size=64)
    make_folder(tmp_path / "plain", images=8, size=64, plain=True)

    odd, plain = (Folder(tmp_path / name).index("train") for name in ("odd", "plain"))
    labels = {index: {} for index in ("odd", "plain")}
    for name, index in (("odd", odd), ("plain", plain)):
        for position, image_id in enumerate(index.ids):
            image, label = index.read(position)
            key = image_id.replace("from phone/", "").removesuffix(" größer 图")
            labels[name][key] = (image, label)
    assert labels["odd"].keys() == labels["plain"].keys()
    for key, (image, label) in labels["odd"].items():
        expected_image, expected_label = labels["plain"][key]
        assert label.tolist() == expected_label.tolist(), key
        grey, expected = (luminance(i) for i in (image, expected_image))
        assert (grey - expected).abs().mean() < 6, key  # palettes and JPEG change colours a little


def test_masks_are_found_under_any_usual_name(tmp_path):
    pair(tmp_path, "cup/a", ".JPG", ".png")
    pair(tmp_path, "cup/b", ".jpeg", "_mask.PNG")
    pair(tmp_path, "cup/c", ".png", "-mask.bmp")
    pair(tmp_path, "cup/d", ".jpg", ".jpg.png")
    pair(tmp_path, "cup/deep/er/e", ".webp", ".tif")
    pair(tmp_path, "cup/version.2.final", ".jpg", ".png")
    pair(tmp_path, unicodedata.normalize("NFC", "cup/größe"), ".jpg", ".png")
    os.rename(
        tmp_path / "masks/cup/größe.png", tmp_path / unicodedata.normalize("NFD", "masks/cup/größe.png")
    )
    os.rename(tmp_path / "masks/cup/a.png", tmp_path / "masks/cup/A.png")
    os.rename(tmp_path / "masks/cup", tmp_path / "masks/Cup")

    listing = list_folder(tmp_path)
    assert not listing.problems
    assert sorted(item.id for item in listing.items) == [
        *("cup/a", "cup/b", "cup/c", "cup/d", "cup/deep/er/e", "cup/größe", "cup/version.2.final")
    ]


def test_hidden_files_and_the_litter_of_systems_are_passed_over(tmp_path):
    pair(tmp_path, "cup/a")
    for name in ("images/.DS_Store", "images/cup/._a.jpg", "images/cup/Thumbs.db", "masks/cup/desktop.ini"):
        (tmp_path / name).write_bytes(b"litter")
    write(tmp_path / "images/cup/.trash/b.jpg")
    write(tmp_path / "images/__MACOSX/b.jpg")

    listing = list_folder(tmp_path)
    assert [item.id for item in listing.items] == ["cup/a"]
    assert not listing.problems


def test_a_folder_linked_into_itself_is_read_once(tmp_path):
    pair(tmp_path, "cup/a")
    os.symlink(tmp_path / "images/cup", tmp_path / "images/cup/again")

    assert len(list_folder(tmp_path).items) == 1


def test_a_picture_of_two_classes_may_lie_in_both_folders(tmp_path):
    pair(tmp_path, "cup/a")
    pair(tmp_path, "spoon/a")

    assert list_folder(tmp_path).items[0].id == "cup/a"
    assert list_folder(tmp_path).items[1].id == "spoon/a"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cup\nspoon\n", ("cup", "spoon")),
        ("\ufeffcup\r\n\r\n  spoon  \r\n", ("cup", "spoon")),
        ("background\ncup\nspoon", ("cup", "spoon")),
        ("0 background\n1 cup\n2 tea spoon", ("cup", "tea spoon")),
        ("2: spoon\n1: cup", ("cup", "spoon")),
        ("чашка\n匙", ("чашка", "匙")),
    ],
)
def test_class_names_are_read_from_any_usual_list(text, names, tmp_path):
    (tmp_path / "classes.txt").write_text(text, encoding="utf-8")

    assert read_names(tmp_path / "classes.txt") == names


def test_indexed_masks_give_their_ids_and_255_is_ignored(tmp_path):
    (tmp_path / "classes.txt").parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "classes.txt").write_text("cup\nspoon\n")
    ids = mask_of(value=2)
    ids[0] = 255
    write(tmp_path / "images/a.jpg")
    label = Image.fromarray(ids)
    label.putpalette([0, 0, 0, 9, 9, 9, 200, 10, 10, *[77] * 759])
    (tmp_path / "masks").mkdir()
    label.save(tmp_path / "masks/a.png")

    _, read = Folder(tmp_path).index("train").read(0)
    assert read.tolist() == ids.tolist()


def test_with_a_single_class_indexed_masks_may_be_white_on_black(tmp_path):
    pair(tmp_path, "a", value=255)
    (tmp_path / "classes.txt").write_text("cup\n")

    assert Folder(tmp_path).index("val").pixels.tolist() == [[70, 10]]


def coco(**changes) -> dict:
    """Two pictures of 10x8 with a 4x2 and a 2x2 object."""
    square = {"id": 1, "image_id": 5, "category_id": 7, "segmentation": [[1, 1, 5, 1, 5, 3, 1, 3]], "area": 8}
    inside = {"id": 2, "image_id": 5, "category_id": 3, "segmentation": [[2, 1, 4, 1, 4, 3, 2, 3]], "area": 4}
    content = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 10, "height": 8} for n in (5, 6)],
        "categories": [{"id": i, "name": n} for i, n in ((7, "cup"), (3, "spoon"), (0, "everything"))],
        "annotations": [inside, square, {**square, "id": 3, "image_id": 6}],
    }
    return {**content, **changes}


def write_coco(root: Path, content: object, images=(5, 6)) -> Path:
    for number in images:
        write(root / "images" / f"{number}.jpg")
    text = content if isinstance(content, str) else json.dumps(content)
    (root / "annotations.json").write_text(text)
    return root


def test_coco_objects_are_drawn_the_smaller_on_top_and_unused_categories_are_no_classes(tmp_path):
    source = Folder(write_coco(tmp_path, coco()))

    assert source.class_names == ("spoon", "cup")  # by ascending category id, renumbered from 1
    _, label = source.index("train").read(0)
    expected = np.zeros((8, 10), int)
    expected[1:3, 1:5] = 2
    expected[1:3, 2:4] = 1
    assert label.tolist() == expected.tolist()


def test_coco_run_lengths_and_crowds_are_read(tmp_path):
    runs_of_ones = [8, 8, 64]  # column 1, from the top down
    crowd = {"counts": [0, 16, 64], "size": [8, 10]}  # columns 0 and 1
    annotations = [
        {"id": 1, "image_id": 5, "category_id": 7, "segmentation": {"counts": runs_of_ones, "size": [8, 10]}},
        {"id": 2, "image_id": 5, "category_id": 7, "segmentation": crowd, "iscrowd": 1, "area": 16},
    ]
    source = Folder(write_coco(tmp_path, coco(annotations=annotations)))

    _, label = source.index("train").read(0)
    expected = np.zeros((8, 10), int)
    expected[:, 0], expected[:, 1] = 255, 1
    assert label.tolist() == expected.tolist()


def test_a_coco_picture_turned_by_exif_follows_the_annotated_size(tmp_path):
    write_coco(tmp_path, coco())
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.random.default_rng(0).integers(0, 256, (10, 8, 3), dtype=np.uint8)  # displayed: 10x8
    Image.fromarray(stored).save(tmp_path / "images/5.jpg", exif=exif)

    image, label = Folder(tmp_path).index("train").read(0)
    assert image.shape[1:] == label.shape == (8, 10)


def test_coco_files_of_other_names_and_places_are_found(tmp_path):
    write_coco(tmp_path, coco())
    (tmp_path / "annotations").mkdir()
    os.rename(tmp_path / "annotations.json", tmp_path / "annotations/instances_default.json")

    assert len(list_folder(tmp_path).items) == 2


def test_large_pictures_are_read_shrunk(tmp_path):
    write(tmp_path / "images/cup/a.jpg", np.zeros((64, 128, 3), np.uint8))
    mask = np.zeros((64, 128), np.uint8)
    mask[:, :64] = 1
    write(tmp_path / "masks/cup/a.png", mask, "L")

    image, label = Folder(tmp_path, long_side=32).index("val").read(0)
    assert image.shape == (3, 16, 32)
    assert label.sum() == 16 * 16
    assert Folder(tmp_path, long_side=None).index("val").read(0)[0].shape == (3, 64, 128)


def test_the_least_size_is_a_share_of_each_picture(tmp_path):
    for name, scale in (("small", 1), ("middle", 2), ("large", 40)):
        write(tmp_path / f"images/cup/{name}.jpg", np.zeros((8 * scale, 10 * scale, 3), np.uint8))
        mask = np.kron(mask_of(), np.ones((scale, scale), np.uint8))
        write(tmp_path / f"masks/cup/{name}.png", mask, "L")
    one_pixel = np.zeros((320, 400), np.uint8)
    one_pixel[5, 5] = 255
    write(tmp_path / "images/cup/speck.jpg", np.zeros((320, 400, 3), np.uint8))
    write(tmp_path / "masks/cup/speck.png", one_pixel, "L")

    source = Folder(tmp_path, min_share=0.1)
    index = source.index("train")
    shown = dict(zip(index.ids, index.pixels[:, 1].tolist(), strict=True))
    assert shown["cup/small"] == shown["cup/middle"] == shown["cup/large"] >= source.min_pixels
    assert shown["cup/speck"] == 1  # scaled down, but never to nothing: the training trick sees every pixel


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_picture_of_a_novel_class_is_trained_on(layout, tmp_path):
    make_folder(tmp_path, layout, images=3, size=32, plain=True)
    source = Folder(tmp_path, novel=["star", "gear"])
    base, novel = source.classes(0)

    def same(image, mask, generator):
        return image.float(), mask

    options = {"seed": 0, "min_pixels": source.min_pixels}
    train = EpisodeDataset(source.index("train"), base, 1, same, novel_images="drop", **options)
    test = EpisodeDataset(source.index("val"), novel, 1, same, fixed=True, **options)
    trained = set(train.queries) | {i for members in train.members.values() for i in members}
    tested = set(test.queries) | {i for members in test.members.values() for i in members}
    assert [source.class_names[c - 1] for c in novel] == ["gear", "star"]
    assert not trained & tested
    assert len(trained) == 12
    assert len(tested) == 6


@pytest.mark.parametrize("line", ["star/star_0", "images/star/star_0.jpg", "star_0.jpg", "STAR/star_0"])
def test_a_list_of_test_images_splits_the_collection(line, tmp_path):
    make_folder(tmp_path, images=2, size=32, plain=True)
    (tmp_path / "val.txt").write_text(f"{line}\n\nleaf/leaf_1\n")
    source = Folder(tmp_path, val_list="val.txt")

    assert set(source.index("val").ids) == {"star/star_0", "leaf/leaf_1"}
    assert len(source.index("train")) == 10
    assert not set(source.index("train").ids) & set(source.index("val").ids)


def test_a_second_start_opens_no_picture_and_a_changed_mask_is_counted_again(tmp_path, monkeypatch):
    make_folder(tmp_path, images=2, size=32, plain=True)
    first = Folder(tmp_path).index("train").pixels
    examined = []
    original = folder_module.examine

    def spy(listing):
        examined.append(len(listing.items))
        return original(listing)

    monkeypatch.setattr(folder_module, "examine", spy)
    assert Folder(tmp_path).index("train").pixels.tolist() == first.tolist()
    assert examined == []

    path = tmp_path / "masks/star/star_0.png"
    full = np.full(np.asarray(Image.open(path)).shape, 255, np.uint8)
    Image.fromarray(full).save(path)
    assert Folder(tmp_path).index("train").pixels[-2].tolist() == [0, 0, 0, 0, 0, 0, full.size]
    assert examined == [12]


def test_without_bad_files_is_a_choice_that_is_told(tmp_path, caplog):
    make_folder(tmp_path, images=2, size=32, plain=True)
    (tmp_path / "images/star/star_0.jpg").write_bytes(b"no image")
    (tmp_path / "masks/leaf/leaf_1.png").unlink()

    with pytest.raises(ValueError, match=r"leaf_1.jpg: has no mask.*skip_bad=true"):
        Folder(tmp_path).ensure()
    index = Folder(tmp_path, skip_bad=True).index("train")
    assert len(index) == 10
    assert "star_0.jpg" in caplog.text
    assert "leaf_1.jpg" in caplog.text


def test_an_index_can_be_sent_to_another_process(tmp_path):
    make_folder(tmp_path, images=1, size=32, plain=True)
    index = Folder(tmp_path).index("train")

    assert pickle.loads(pickle.dumps(index)).read(0)[0].tolist() == index.read(0)[0].tolist()


@pytest.mark.parametrize("folds", [2, 3, 4, 5, 7, None])
@pytest.mark.parametrize("classes", [7, 9, 20])
def test_own_folds_share_out_all_classes_evenly(classes, folds):
    names = [f"class {i}" for i in range(classes)]
    parts = [split_own_classes(names, fold, folds=folds) for fold in range(folds or 4)]

    assert [c for _, novel in parts for c in novel] == list(range(1, classes + 1))
    assert max(len(novel) for _, novel in parts) - min(len(novel) for _, novel in parts) <= 1
    for base, novel in parts:
        assert sorted(base + novel) == list(range(1, classes + 1))


def test_few_classes_make_as_many_folds():
    assert [split_own_classes(["a", "b", "c"], fold)[1] for fold in range(3)] == [(1,), (2,), (3,)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": 3}, "fold is 3; 3 own classes have folds 0 to 2"),
        ({"fold": True}, "fold is True"),
        ({"fold": 0, "folds": 4}, "folds is 4; 3 classes make 2 to 3 folds"),
        ({"fold": 0, "folds": 1}, "folds is 1"),
        (
            {"fold": 0, "novel": ["spon"]},
            r"did you mean spoon\?\); name some of the classes cup, fork, spoon",
        ),
        ({"fold": 0, "novel": []}, r"novel is \[\]; name some"),
        ({"fold": 0, "novel": ["cup", "fork", "spoon"]}, "which is every class: leave some"),
        ({"fold": 1, "novel": ["cup"]}, "fold is 1, but .* makes one split: use fold=0"),
    ],
)
def test_an_impossible_split_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        split_own_classes(["cup", "fork", "spoon"], **options)


def test_a_single_class_cannot_train_but_is_told_what_can():
    with pytest.raises(ValueError, match=r"only cup. `svf predict` segments a class without training"):
        split_own_classes(["cup"], 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": None}, "root is not set: .*data.root=my_photos"),
        ({"root": "x", "min_share": 1.0}, r"min_share is 1\.0; it is a share"),
        ({"root": "x", "long_side": 8}, "long_side is 8; use 32 pixels or more"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Folder(**options)


def test_the_command_line_reaches_the_folder(tmp_path):
    make_folder(tmp_path / "photos", images=2, size=32, plain=True)
    overrides = ["data=folder", f"data.root={tmp_path / 'photos'}", "data.novel=[star,leaf]"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=overrides, return_hydra_config=False)
    from omegaconf import OmegaConf

    data = OmegaConf.to_container(config.data, resolve=True)
    module = build_object(data, "data", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert [module.source.class_names[c - 1] for c in module.roles.test] == ["leaf", "star"]
