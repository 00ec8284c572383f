"""Whatever is wrong with a folder is listed, all of it, with its file and a remedy."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from svf_lightning.analysis.overlays import add_legend, class_colour, tint
from svf_lightning.cli import app
from svf_lightning.data.folder import Folder
from svf_lightning.own_images.check import check
from tests.made_folder import make_folder
from tests.made_voc import make_voc


@pytest.fixture(autouse=True)
def _own_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))


@dataclass
class Case:
    """One kind of bad input: how to make it, the file to be named, and words about it and its remedy."""

    layout: str
    file: str
    spoil: object  # a function of the root
    words: tuple[str, ...]


def cut(root: Path, name: str) -> None:
    content = (root / name).read_bytes()
    (root / name).write_bytes(content[: len(content) // 2])


def save(root: Path, name: str, pixels: np.ndarray) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(root / name)


def size_of(root: Path, name: str) -> tuple[int, int]:
    with Image.open(root / name) as image:
        return image.height, image.width


def edit(root: Path, change: object) -> None:
    path = root / "annotations.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


STAR, MASK = "images/star/star_0.jpg", "masks/star/star_0.png"
FLAT, LABEL = "images/star_0.jpg", "masks/star_0.png"
JSON = "annotations.json"


def several_ids(root):
    height, width = size_of(root, STAR)
    ids = np.zeros((height, width), np.uint8)
    ids[:4], ids[4:8] = 1, 2
    save(root, MASK, ids)


def two_colours(root):
    height, width = size_of(root, STAR)
    colours = np.zeros((height, width, 3), np.uint8)
    colours[:9, :, 0], colours[9:18, :, 1] = 255, 255
    save(root, MASK, colours)


def label(root, value, dtype=np.uint8):
    height, width = size_of(root, FLAT)
    ids = np.zeros((height, width), dtype)
    ids[3:9, 3:9] = value
    save(root, LABEL, ids)


def label_as_jpeg(root):
    height, width = size_of(root, FLAT)
    ids = np.zeros((height, width), np.uint8)
    ids[5:40, 3:30] = 6
    Image.fromarray(ids).save(root / "masks/star_0.jpg", quality=30)
    (root / LABEL).unlink()


def break_middle(root):
    content = bytearray((root / MASK).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (root / MASK).write_bytes(content)


def point(root, target):
    (root / STAR).unlink()
    (root / STAR).symlink_to(target)


def segment(content, segmentation):
    """Give the first object, of an image of 36x48 pixels, another outline."""
    content["annotations"][0]["segmentation"] = segmentation


def many_categories(content):
    first = content["annotations"][0]
    numbers = range(1000, 1260)
    content["categories"] = [{"id": number, "name": f"thing {number}"} for number in numbers]
    content["annotations"] = [{**first, "id": n, "category_id": n} for n in numbers]


def link(root, name, other):
    (root / other).write_bytes((root / name).read_bytes())


BAD = {
    "an image without a mask": Case(
        "folders", STAR, lambda r: (r / MASK).unlink(), ("has no mask", "draw", "masks/star/star_0.png")
    ),
    "an empty mask": Case(
        "folders",
        MASK,
        lambda r: save(r, MASK, np.zeros(size_of(r, STAR), np.uint8)),
        ("is empty", "white on black"),
    ),
    "a mask larger than its image": Case(
        "folders",
        MASK,
        lambda r: save(r, MASK, np.full((90, 90), 255, np.uint8)),
        ("90x90", "36x48", "export"),
    ),
    "a JPEG cut short": Case(
        "folders", STAR, lambda r: cut(r, STAR), ("cannot be decoded", "truncated", "intact")
    ),
    "an image of zero bytes": Case(
        "folders", STAR, lambda r: (r / STAR).write_bytes(b""), ("empty, 0 bytes", "intact copy")
    ),
    "a page instead of an image": Case(
        "folders", STAR, lambda r: (r / STAR).write_text("<html>404</html>"), ("not an image", "intact copy")
    ),
    "a mask of zero bytes": Case(
        "folders", MASK, lambda r: (r / MASK).write_bytes(b""), ("empty, 0 bytes", "intact copy")
    ),
    "a mask cut short": Case("folders", MASK, lambda r: cut(r, MASK), ("cannot be decoded", "intact copy")),
    "a mask with a broken middle": Case(
        "folders", MASK, break_middle, ("cannot be decoded (broken", "intact copy")
    ),
    "a link to a file that is gone": Case(
        "folders", STAR, lambda r: point(r, "/nowhere/star.jpg"), ("is missing", "put it back")
    ),
    "a link to itself": Case(
        "folders", STAR, lambda r: point(r, r / STAR), ("Too many levels of symbolic links", "intact copy")
    ),
    "a pipe with the name of an image": Case(
        "folders",
        STAR,
        lambda r: [(r / STAR).unlink(), os.mkfifo(r / STAR)],
        ("is a pipe, socket or device", "delete it"),
    ),
    "class ids in a mask": Case(
        "folders", MASK, several_ids, ("0, 1, 2", "look like class ids", "classes.txt")
    ),
    "colours in a mask": Case("folders", MASK, two_colours, ("2 colours", "white on black")),
    "two images for one mask": Case(
        "folders",
        "images/star/star_0.png",
        lambda r: save(r, "images/star/star_0.png", np.zeros((9, 9, 3), np.uint8)),
        ("star_0.jpg has the same name", "rename one"),
    ),
    "two masks for one image": Case(
        "folders", STAR, lambda r: link(r, MASK, "masks/star/star_0.bmp"), ("has 2 masks", "keep one")
    ),
    "a class without masks": Case(
        "folders",
        "masks/star",
        lambda r: (r / "masks/star").rename(r / "stars"),
        ("is missing", "2 images", "put"),
    ),
    "a class without images": Case(
        "folders", "images/moon", lambda r: (r / "images/moon").mkdir(), ("holds no images", "put some")
    ),
    "a HEIC picture": Case(
        "folders",
        "images/star/IMG_1.HEIC",
        lambda r: (r / "images/star/IMG_1.HEIC").write_bytes(b"heic"),
        (".HEIC files are not read", "convert it"),
    ),
    "a picture outside of the classes": Case(
        "folders",
        "images/lost.jpg",
        lambda r: link(r, STAR, "images/lost.jpg"),
        ("no class folder", "<class>"),
    ),
    "one class in two spellings": Case(
        "folders", "images/star", lambda r: link_folder(r), ("same class as STAR", "one folder")
    ),
    "ids without names": Case(
        "indexed", LABEL, lambda r: label(r, 9), ("holds the ids 9", "names 1 to 6", "renumber")
    ),
    "a colour label": Case(
        "indexed",
        LABEL,
        lambda r: save(r, LABEL, np.random.default_rng(0).integers(0, 9, (*size_of(r, FLAT), 3), np.uint8)),
        ("shows colours", "greyscale or palette PNG"),
    ),
    "ids beyond 255": Case("indexed", LABEL, lambda r: label(r, 300, np.uint16), ("up to 300", "renumber")),
    "a mask where a label should be": Case(
        "indexed", LABEL, lambda r: label(r, 255), ("only 0 and 255", "write the class ids")
    ),
    "a label saved as JPEG": Case(
        "indexed", "masks/star_0.jpg", label_as_jpeg, ("holds the ids", "save it as PNG: JPEG blurs")
    ),
    "a folder in place of the class names": Case(
        "indexed",
        "",
        lambda r: [(r / "classes.txt").unlink(), (r / "classes.txt").mkdir()],
        ("classes.txt cannot be read (Is a directory)", "put a text file there"),
    ),
    "no class names": Case(
        "indexed", "", lambda r: (r / "classes.txt").write_text("\n"), ("names no class", "one name per")
    ),
    "class names twice": Case(
        "indexed",
        "",
        lambda r: (r / "classes.txt").write_text("cup\nfork\nCup"),
        ("names 'cup' 2 times", "of its own"),
    ),
    "class names in Latin-1": Case(
        "indexed",
        "",
        lambda r: (r / "classes.txt").write_bytes("Löffel".encode("latin-1")),
        ("not UTF-8", "save it as"),
    ),
    "class numbers with a gap": Case(
        "indexed",
        "",
        lambda r: (r / "classes.txt").write_text("1 cup\n3 fork"),
        ("numbers its classes 1, 3", "1, 2, 3"),
    ),
    "broken JSON": Case("coco", "", lambda r: cut(r, JSON), ("no sound JSON", "export it again")),
    "JSON of something else": Case(
        "coco", "", lambda r: (r / JSON).write_text("{}"), ("not in COCO's format", "export")
    ),
    "JSON with holes": Case(
        "coco",
        "",
        lambda r: edit(r, lambda c: c["images"][0].pop("file_name")),
        ("without 'file_name'", "complete"),
    ),
    "an annotated image that is not there": Case(
        "coco", JSON, lambda r: (r / FLAT).unlink(), ("lists star_0.jpg, which is not in", "put it there")
    ),
    "an annotation of no image": Case(
        "coco",
        JSON,
        lambda r: edit(r, lambda c: c["annotations"][0].update(image_id=99)),
        ("of image 99", "export"),
    ),
    "an annotation of no category": Case(
        "coco",
        JSON,
        lambda r: edit(r, lambda c: c["annotations"][0].update(category_id=99)),
        ("category 99", "export"),
    ),
    "a box without an outline": Case(
        "coco",
        JSON,
        lambda r: edit(r, lambda c: c["annotations"][0].update(segmentation=[])),
        ("no outline", "outline the"),
    ),
    "a polygon of two points": Case(
        "coco",
        JSON,
        lambda r: edit(r, lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4]])),
        ("fewer than three points", "outline the object"),
    ),
    "a polygon of seven numbers": Case(
        "coco",
        JSON,
        lambda r: edit(r, lambda c: c["annotations"][0].update(segmentation=[[1.0] * 7])),
        ("odd number of coordinates", "outline the object"),
    ),
    "run lengths of another size": Case(
        "coco",
        JSON,
        lambda r: edit(
            r, lambda c: c["annotations"][0].update(segmentation={"counts": [1, 2], "size": [1, 3]})
        ),
        ("run lengths for [1, 3]", "outline the object"),
    ),
    "an image of another size than annotated": Case(
        "coco",
        FLAT,
        lambda r: save(r, FLAT, np.zeros((10, 10, 3), np.uint8)),
        ("10x10", "36x48", "annotated version"),
    ),
    "an image annotated twice": Case(
        "coco",
        JSON,
        lambda r: edit(r, lambda c: c["images"].append({**c["images"][-1], "id": 77})),
        ("lists star_1.jpg twice", "delete one"),
    ),
    "image ids twice": Case(
        "coco",
        JSON,
        lambda r: edit(r, lambda c: c["images"].append({**c["images"][-1], "file_name": "x.jpg"})),
        ("an id that another has", "renumber"),
    ),
    "a run length cut short": Case(
        "coco",
        JSON,
        lambda r: edit(r, lambda c: segment(c, {"counts": [5, 5], "size": [48, 36]})),
        ("run lengths for 10 pixels, but its image has 1728", "outline"),
    ),
    "run lengths that are no numbers": Case(
        "coco",
        JSON,
        lambda r: edit(r, lambda c: segment(c, {"counts": [5, -5], "size": [48, 36]})),
        ("run lengths that are no counts", "outline"),
    ),
    "compressed run lengths that are damaged": Case(
        "coco",
        "images/arrow_0.jpg",
        lambda r: edit(r, lambda c: segment(c, {"counts": "~" * 500, "size": [48, 36]})),
        ("cannot be drawn", "outline the object again"),
    ),
    "run lengths without a size": Case(
        "coco",
        JSON,
        lambda r: edit(r, lambda c: segment(c, {"counts": "abc", "size": None})),
        ("neither polygons nor run lengths", "outline"),
    ),
    "a polygon with a corner at infinity": Case(
        "coco",
        JSON,
        lambda r: edit(r, lambda c: segment(c, [[0, 0, 9, 9, float("inf"), 3]])),
        ("a polygon of other things", "outline"),
    ),
    "captions in place of outlines": Case(
        "coco",
        "",
        lambda r: edit(r, lambda c: [a.pop("category_id") for a in c["annotations"]]),
        ("an entry of annotations without 'category_id'", "not captions"),
    ),
    "a file of captions as COCO has it": Case(
        "coco", "", lambda r: edit(r, lambda c: c.pop("categories")), ("not in COCO's format", "not captions")
    ),
    "key points in place of outlines": Case(
        "coco",
        JSON,
        lambda r: edit(r, lambda c: [a.pop("segmentation") for a in c["annotations"]]),
        ("no outline", "outline the object"),
    ),
    "an annotation that is a number": Case(
        "coco",
        "",
        lambda r: edit(r, lambda c: c.update(annotations=[7])),
        ("an entry of annotations that is 7", "export it again"),
    ),
    "an image with a list as its id": Case(
        "coco",
        "",
        lambda r: edit(r, lambda c: c["images"][0].update(id=[1])),
        ("an entry of images with id [1]", "export it again"),
    ),
    "an image without a name": Case(
        "coco",
        "",
        lambda r: edit(r, lambda c: c["images"][0].update(file_name=None)),
        ("an entry of images with file_name null", "export it again"),
    ),
    "a name that no file can have": Case(
        "coco",
        JSON,
        lambda r: edit(r, lambda c: c["images"][0].update(file_name="a" * 5000)),
        ("aaa, which is not in", "put it there"),
    ),
    "a width in words": Case(
        "coco",
        JSON,
        lambda r: edit(r, lambda c: c["images"][0].update(width="wide")),
        ("arrow_0.jpg the width 'wide'", "whole numbers"),
    ),
    "more categories than ids": Case(
        "coco",
        "",
        lambda r: edit(r, many_categories),
        ("of 260 categories, but ids end at 254", "merge some"),
    ),
    "JSON nested without end": Case(
        "coco", "", lambda r: (r / JSON).write_text("[" * 100_000), ("no sound JSON", "export it again")
    ),
    "JSON in UTF-16": Case(
        "coco",
        "",
        lambda r: (r / JSON).write_bytes((r / JSON).read_text().encode("utf-16")),
        ("annotations.json is not UTF-8 text", "save it as UTF-8"),
    ),
    "no folder of images": Case(
        "coco",
        JSON,
        lambda r: shutil.rmtree(r / "images"),
        ("lists arrow_0.jpg, which is not", "put it there"),
    ),
    "no annotations": Case(
        "coco",
        "",
        lambda r: edit(r, lambda c: c["annotations"].clear()),
        ("annotates nothing", "outline some"),
    ),
    "two categories of one name": Case(
        "coco",
        "",
        lambda r: edit(r, lambda c: c["categories"][0].update(name="STAR")),
        ("categories of one name", "merge"),
    ),
}


def link_folder(root: Path) -> None:
    (root / "images/STAR").mkdir()
    link(root, STAR, "images/STAR/star_9.jpg")


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_listed_with_its_file_and_a_remedy_and_refused_in_training(kind, tmp_path):
    case = BAD[kind]
    root = tmp_path / "photos"
    make_folder(root, case.layout, images=2, size=48, plain=True)
    case.spoil(root)

    found = [
        p for p in check(root).problems if p.severity == "error" and all(w in str(p) for w in case.words)
    ]
    assert found, [str(p) for p in check(root).problems]
    assert found[0].file == (case.file or str(root))
    assert "\n" not in str(found[0])
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        Folder(root).index("train")
    assert case.words[0] in str(refused.value)


def test_all_that_is_wrong_is_listed_at_once_and_the_rest_is_still_understood(tmp_path):
    root = tmp_path / "photos"
    make_folder(root, images=4, size=48, plain=True)
    (root / "masks/star/star_0.png").unlink()
    (root / "images/star/star_1.jpg").write_bytes(b"")
    save(root, "masks/leaf/leaf_0.png", np.zeros((48, 36), np.uint8))
    cut(root, "images/gear/gear_3.jpg")
    (root / "images/moon").mkdir()

    survey = check(root)
    named = {problem.file for problem in survey.problems if problem.severity == "error"}
    assert named == {
        *("images/star/star_0.jpg", "images/star/star_1.jpg", "masks/leaf/leaf_0.png"),
        *("images/gear/gear_3.jpg", "images/moon", "class moon"),
    }
    assert len(survey.ids) == 20
    assert [len(survey.shares(c)) for c in range(1, 8)] == [4, 4, 4, 3, 3, 0, 2]


def test_a_file_that_may_not_be_read_is_told_from_a_broken_one(tmp_path, monkeypatch):
    make_folder(tmp_path, images=2, size=32, plain=True)
    original = Image.open

    def guarded(path, *args):
        if str(path).endswith(
            "star_0.jpg"
        ):  # as the system does; root, whom CI often runs as, is not stopped
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *args)

    monkeypatch.setattr(Image, "open", guarded)
    (problem,) = [p for p in check(tmp_path).problems if p.severity == "error" and "class" not in p.file]
    assert problem.file == STAR
    assert "permission denied" in problem.found
    assert "chmod u+r" in problem.remedy


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    make_folder(tmp_path, images=2, size=32, plain=True)
    import os

    original = os.scandir

    def guarded(path):
        if str(path).endswith("images/star"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", guarded)
    found = [str(p) for p in check(tmp_path).problems]
    assert any("images/star: cannot be listed; allow it (Permission denied)" in text for text in found)


def test_a_picture_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    make_folder(tmp_path, images=2, size=32, plain=True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)

    assert "has over 20 pixels: shrink it first" in str(check(tmp_path).problems[0]).replace("; ", ": ")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda r: None, ("does not exist", "name the folder")),
        (lambda r: r.write_text("x"), ("is a file", "name the folder")),
        (
            lambda r: r.mkdir(),
            ("it holds nothing", "images/<class>/x.jpg", "classes.txt", "annotations.json"),
        ),
        (lambda r: (r / "pics").mkdir(parents=True), ("it holds pics", "images/<class>/x.jpg")),
        (lambda r: make_folder(r / "deep", images=1, size=32, plain=True), ("lies deeper; use", "deep")),
        (
            lambda r: [(r / n).mkdir(parents=True) for n in ("images", "masks")],
            ("no folder per class", "classes.txt"),
        ),
    ],
)
def test_a_folder_in_none_of_the_layouts_is_told_what_they_are(make, words, tmp_path):
    root = tmp_path / "photos"
    make(root)

    (problem,) = check(root).problems
    for word in words:
        assert word in str(problem)
    with pytest.raises(FileNotFoundError):
        Folder(root).ensure()


def test_the_folder_of_images_itself_is_sent_one_up(tmp_path):
    make_folder(tmp_path / "photos", images=1, size=32, plain=True)

    assert f"one folder up: use {tmp_path / 'photos'}" in str(
        check(tmp_path / "photos/images").problems[0]
    ).replace("; ", ": ")


@pytest.mark.parametrize(("shot", "errors"), [(0, 0), (1, 0), (2, 6), (5, 6)])
def test_a_class_with_too_few_images_for_the_shots_is_an_error(shot, errors, tmp_path):
    make_folder(tmp_path, images=2, size=32, plain=True)

    problems = check(tmp_path, shot=shot).problems
    assert len(problems) == errors
    assert all("has 2 usable images" in p.found and "lower shot" in p.remedy for p in problems)


def animate(root: Path) -> None:
    with Image.open(root / STAR) as picture:
        frames = [picture.rotate(angle).convert("P") for angle in (0, 5, 10)]
    (root / STAR).unlink()
    frames[0].save(root / "images/star/star_0.gif", save_all=True, append_images=frames[1:])


def warnings_of(root: Path) -> list[str]:
    survey = check(root)
    assert survey.count("error") == 0, [str(p) for p in survey.problems]
    return [str(problem) for problem in survey.problems]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda r: save(r, MASK, np.full(size_of(r, STAR), 255, np.uint8)),
            "covers 100% of its picture; if it is inv",
        ),
        (
            lambda r: (r / "images/star/notes.txt").write_text("x"),
            "notes.txt: .txt files are not read; it is passed over",
        ),
        (
            lambda r: save(r, STAR, np.full((*size_of(r, STAR), 3), 9, np.uint8)),
            "shows a single colour; look at it",
        ),
        (
            lambda r: link(r, MASK, "masks/star/star_77.png"),
            "star_77.png: is a mask without an image; add its image",
        ),
        (
            lambda r: [link(r, STAR, "images/star/a.jpg"), link(r, MASK, "masks/star/a.png")],
            "is the same picture as",
        ),
        (
            lambda r: animate(r),
            "star_0.gif: has 3 frames, of which the first is used; save the others apart",
        ),
    ],
)
def test_what_is_merely_odd_is_a_warning(spoil, words, tmp_path):
    make_folder(tmp_path, images=3, size=48, plain=True)
    spoil(tmp_path)

    assert any(words in text for text in warnings_of(tmp_path))


def test_an_object_too_small_to_count_is_a_warning_with_the_setting(tmp_path):
    make_folder(tmp_path, images=3, size=96, plain=True)
    speck = np.zeros(size_of(tmp_path, STAR), np.uint8)
    speck[5, 5] = 255
    save(tmp_path, MASK, speck)

    (text,) = warnings_of(tmp_path)
    assert "star_0.png: shows 1 pixels of star, 0.014% of the picture" in text
    assert "min_share=7e-05" in text


def test_a_published_data_set_is_recognised(tmp_path):
    make_voc(tmp_path)

    survey = check(tmp_path, shot=0)
    assert survey.layout.startswith("pascal")
    assert len(survey.ids) == 12
    assert survey.count("error") == sum(1 for c in range(1, 21) if not len(survey.shares(c)))


def test_a_published_data_set_without_labels_and_lists_has_one_problem(tmp_path):
    root = tmp_path / "voc"
    (root / "JPEGImages").mkdir(parents=True)

    (problem,) = check(root).problems
    assert problem.file == str(root)
    assert problem.found.startswith("holds no SegmentationClassAug, ImageSets/Segmentation/")
    assert problem.remedy.endswith("; folders will do for archives")


def test_every_bad_file_of_a_published_data_set_is_one_problem_even_with_odd_names(tmp_path):
    make_voc(tmp_path)
    first, second = sorted((tmp_path / "SegmentationClassAug").glob("*.png"))[:2]
    first.write_bytes(b"")
    second.unlink()

    assert [(p.file, p.found) for p in check(tmp_path, shot=0).problems] == [
        (f"SegmentationClassAug/{first.name}", "cannot be decoded (empty, 0 bytes)"),
        (f"SegmentationClassAug/{second.name}", "is missing"),
    ]


@pytest.mark.parametrize("folder", ["a: b", "a; b"])
def test_a_name_with_marks_in_it_is_kept_whole(folder, tmp_path):
    root = tmp_path / folder
    make_folder(root, images=2, size=32, plain=True)
    (root / STAR).rename(root / "images/star/odd: name; too.jpg")
    (root / MASK).write_bytes(b"")

    found = {(p.file, p.found) for p in check(root, shot=0).problems if p.severity == "error"}
    assert found == {("images/star/odd: name; too.jpg", "has no mask")}


def run(*arguments: object):
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


def test_the_command_prints_counts_and_writes_a_sheet_and_ends_well(tmp_path):
    make_folder(tmp_path / "photos", images=2, size=48, plain=True)

    result = run(tmp_path / "photos", "--sheet", tmp_path / "sheet.png")
    assert result.exit_code == 0, result.output
    assert "12 usable images of 6 classes, 36x48 pixels" in result.output
    assert "0 errors, 0 warnings" in result.output
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 500
        assert sheet.height > 6 * 132


def test_names_of_old_archives_are_read_and_told(tmp_path):
    """Names in Latin-1, which are no UTF-8: Python holds their bytes as surrogates."""
    root = tmp_path / "photos"
    make_folder(root, images=3, size=48, plain=True)
    for kind in ("images", "masks"):
        os.rename(root / kind / "leaf", os.fsencode(root / kind) + b"/bl\xe4tter")
    (root / "images/star/star_0.jpg").rename(Path(os.fsdecode(os.fsencode(root) + b"/images/star/\xe9.jpg")))
    result = CliRunner().invoke(app, ["check", str(root), "--sheet", str(tmp_path / "sheet.png")])

    assert result.exit_code == 1
    assert r"bl\udce4tter" in result.output
    assert r"images/star/\udce9.jpg: has no mask" in result.output
    assert (tmp_path / "sheet.png").is_file()
    assert r"bl\udce4tter" in Folder(root, skip_bad=True).class_names


def test_the_command_ends_with_status_1_and_draws_what_is_good(tmp_path):
    make_folder(tmp_path / "photos", images=3, size=48, plain=True)
    (tmp_path / "photos" / STAR).write_bytes(b"")

    result = run(tmp_path / "photos", "--sheet", tmp_path / "sheet.png")
    assert result.exit_code == 1
    assert "images/star/star_0.jpg: cannot be decoded (empty, 0 bytes)" in result.output
    assert "→ replace it by an intact copy" in result.output
    assert "1 error, 0 warnings, 17 usable images" in result.output
    assert (tmp_path / "sheet.png").is_file()


def test_the_command_needs_no_sheet_where_nothing_is_good(tmp_path):
    result = run(tmp_path / "nowhere")

    assert result.exit_code == 1
    assert "does not exist" in result.output


def test_a_tint_is_confined_to_its_class_and_grey_marks_what_is_ignored():
    image = Image.new("RGB", (40, 40), (0, 0, 0))
    mask = np.zeros((40, 40), np.uint8)
    mask[5:25, 5:25], mask[30:, 30:] = 2, 255

    pixels = np.asarray(tint(image, mask, {2: (200, 100, 50)}, strength=0.5))
    assert pixels[15, 15].tolist() == [100, 50, 25]
    assert pixels[5, 10].tolist() == [200, 100, 50]  # the outline
    assert pixels[35, 35].tolist() == [64, 64, 64]
    assert not pixels[mask == 0].any()


def test_a_legend_leaves_the_picture_as_it_is_and_breaks_into_lines():
    image = Image.new("RGB", (120, 30), (9, 9, 9))
    out = add_legend(image, [(f"class {c}", class_colour(c)) for c in range(1, 6)])

    assert np.asarray(out)[:30].tolist() == np.asarray(image).tolist()
    assert out.height > 30 + 2 * 15
    assert add_legend(image, []) is image


def test_no_two_classes_share_a_colour():
    assert len({class_colour(c) for c in range(1, 81)}) == 80
