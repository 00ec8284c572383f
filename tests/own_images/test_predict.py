"""Own pictures by a few examples: known answers, shapes, several classes, and what people get wrong."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from svf_lightning.backbones.backbone import Backbone
from svf_lightning.cli import app
from svf_lightning.episode import Episode, Prediction
from svf_lightning.models.prototype import Matcher
from svf_lightning.own_images import command, predict
from svf_lightning.own_images.command import find_queries
from svf_lightning.own_images.predict import FewShotPredictor, Segmentation
from svf_lightning.own_images.supports import support_pairs
from svf_lightning.runs.run import load_run

EARLIER_RUN = Path(__file__).parents[1] / "runs" / "earlier_run"
GREEN, RED, BLUE, YELLOW = (30, 160, 40), (220, 30, 30), (30, 40, 220), (220, 210, 30)


def colours() -> Backbone:
    """A backbone whose features are the colours of the picture, at half of its size from stage 2 on."""
    stages = [nn.Identity(), nn.Identity(), nn.AvgPool2d(2), nn.Identity(), nn.Identity()]
    return Backbone(stages, (3,) * 5, (1, 1, 2, 2, 2), mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture(autouse=True)
def _small_backbone(monkeypatch):
    monkeypatch.setattr(predict, "efficientnet_lite0", colours)


def scene(*blobs, size=(64, 48), ground=GREEN) -> np.ndarray:
    """A picture ``(H, W, 3)`` with rectangles of the given colours: (colour, top, bottom, left, right)."""
    picture = np.empty((*size, 3), np.uint8)
    picture[:] = ground
    for colour, top, bottom, left, right in blobs:
        picture[top:bottom, left:right] = colour
    return picture


def where(picture: np.ndarray, colour) -> np.ndarray:
    return (picture == np.asarray(colour)).all(axis=-1)


ONE_RED = scene((RED, 8, 24, 8, 24))
ONE_BLUE = scene((BLUE, 24, 48, 16, 40))
BOTH = scene((RED, 4, 20, 4, 28), (BLUE, 32, 56, 12, 36))


def predictor(**options) -> FewShotPredictor:
    return FewShotPredictor(image_size=64, device="cpu", **options)


def red_and_blue() -> FewShotPredictor:
    return predictor().fit(
        {"red": [ONE_RED], "blue": [ONE_BLUE]},
        {"red": [where(ONE_RED, RED)], "blue": [where(ONE_BLUE, BLUE)]},
    )


def test_the_matcher_finds_the_colour_that_it_was_shown():
    (result,) = predictor().fit([ONE_RED], [where(ONE_RED, RED)]).predict([BOTH])

    wrong = (result.mask == 1) ^ where(BOTH, RED)
    assert wrong.sum() <= 4 * 24  # a pixel of blur around the blob
    assert not result.mask[30:].any()


def test_the_matcher_scores_by_the_difference_of_two_cosines():
    episode = Episode(
        *(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)),
        *(torch.zeros(1, 1, 3, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.long), torch.tensor([1])),
    )
    episode.query_image[:] = torch.tensor([3.0, 4.0, 0.0])[:, None, None]
    episode.support_images[:, :, 0, :, :2], episode.support_images[:, :, 1, :, 2:] = 2.0, 5.0
    episode.support_masks[..., :2] = 1

    logits = Matcher(colours(), stages=(2,), temperature=10.0)(episode).logits
    # The query's colour (3, 4, 0) / 5 against (1, 0, 0) inside and (0, 1, 0) outside of the mask.
    torch.testing.assert_close(logits, torch.tensor([8.0, 6.0])[None, :, None, None].expand(1, 2, 4, 4))


def test_ignored_pixels_count_on_neither_side():
    picture = scene((RED, 8, 24, 8, 24), (BLUE, 40, 60, 8, 40))
    mask = where(picture, RED).astype(np.uint8)
    images = torch.from_numpy(picture).permute(2, 0, 1).float()[None, None] / 255
    plain = torch.from_numpy(mask).long()[None, None]
    ignored = plain.clone()
    ignored[0, 0][torch.from_numpy(where(picture, BLUE))] = 255

    matcher = Matcher(colours())
    with_blue, without = (matcher.prototypes(images, m).background[0] for m in (plain, ignored))
    blue, green = (nn.functional.normalize(torch.tensor(c).float(), dim=0) for c in (BLUE, GREEN))
    cosine = torch.cosine_similarity(without[:3], green, dim=0)
    assert cosine > 0.999
    assert torch.cosine_similarity(with_blue[:3], blue, dim=0) > torch.cosine_similarity(
        without[:3], blue, dim=0
    )


@pytest.mark.parametrize("size", [32, 33])
def test_shots_share_one_prototype_weighted_by_area(size):
    images = torch.zeros(1, 2, 3, size, size)
    masks = torch.zeros(1, 2, size, size, dtype=torch.long)
    images[0, 0, 0], images[0, 1, 1] = 1.0, 1.0
    masks[0, 0, :16], masks[0, 1, :8] = 1, 1  # twice the area of the first colour

    red, green = Matcher(colours(), stages=(2,)).prototypes(images, masks).foreground[0, :2]
    assert red / green == pytest.approx(2, rel=0.1)


def test_several_classes_are_told_apart_and_from_the_background():
    (result,) = red_and_blue().predict([BOTH])

    assert result.class_names == ("red", "blue")
    for class_id, colour in ((1, RED), (2, BLUE)):
        shown = where(BOTH, colour)
        found = result.mask == class_id
        assert (found & shown).sum() / (found | shown).sum() > 0.85
    assert set(np.unique(result.mask)) == {0, 1, 2}


def test_a_pixel_goes_to_the_largest_log_odds_above_even():
    margins = torch.tensor([[[1.0, -1.0, 2.0, -3.0]], [[0.5, 2.0, -1.0, -2.0]]])

    assert predict._largest(margins, (1, 4)).tolist() == [[1, 2, 1, 0]]


@pytest.mark.parametrize("size", [(1, 1), (7, 200), (300, 5), (64, 48), (511, 257)])
def test_masks_and_probabilities_have_the_size_of_the_picture(size):
    (result,) = red_and_blue().predict([np.full((*size, 3), RED, np.uint8)])

    assert result.mask.shape == size
    assert result.mask.dtype == np.uint8
    assert result.probability("blue").shape == size
    assert (result.mask == 1).all()
    assert result.overlay().size[0] == size[1]


def test_the_batch_size_changes_no_result():
    pictures = [BOTH, ONE_RED, ONE_BLUE, scene(), BOTH[:40]]
    results = [
        predictor(batch_size=b).fit([ONE_RED], [where(ONE_RED, RED)]).predict(pictures) for b in (1, 2, 8)
    ]

    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.mask.tolist() == b.mask.tolist()


def test_files_images_and_arrays_give_the_same(tmp_path):
    for name, array in (("support.png", ONE_RED), ("query.png", BOTH)):
        Image.fromarray(array).save(tmp_path / name)
    mask = where(ONE_RED, RED)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    forms = [
        ([ONE_RED], [mask], [BOTH]),
        (ONE_RED, mask, BOTH),
        ([ONE_RED / 255], [mask.astype(float)], [BOTH]),
        ([Image.fromarray(ONE_RED)], [Image.fromarray(255 * mask.astype(np.uint8))], [Image.fromarray(BOTH)]),
        ([tmp_path / "support.png"], [tmp_path / "mask.png"], [tmp_path / "query.png"]),
        (str(tmp_path / "support.png"), str(tmp_path / "mask.png"), str(tmp_path / "query.png")),
    ]

    masks = [
        predictor().fit(images, masks).predict(queries)[0].mask.tolist() for images, masks, queries in forms
    ]
    assert all(mask == masks[0] for mask in masks)


def save_pair(root: Path, name: str, picture: np.ndarray, mask: np.ndarray) -> None:
    for folder, array in (("images", picture), ("masks", mask)):
        path = root / folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


@pytest.fixture
def examples(tmp_path) -> Path:
    """A folder of supports: two of red, one of blue."""
    root = tmp_path / "examples"
    other = scene((RED, 30, 50, 10, 30))
    save_pair(root, "red/a", ONE_RED, where(ONE_RED, RED))
    save_pair(root, "red/b", other, where(other, RED))
    save_pair(root, "blue/c", ONE_BLUE, where(ONE_BLUE, BLUE))
    return root


@pytest.fixture
def queries(tmp_path) -> Path:
    root = tmp_path / "queries"
    (root / "deep").mkdir(parents=True)
    Image.fromarray(BOTH).save(root / "both.png")
    Image.fromarray(ONE_RED).save(root / "deep" / "red.png")
    return root


def test_a_folder_of_supports_is_read_in_its_layout(examples):
    fitted = predictor().fit(examples)

    assert fitted.class_names == ("blue", "red")
    assert [len(images) for images, _ in fitted.supports.values()] == [1, 2]
    assert [len(images) for images, _ in predictor().fit(examples, shots=1).supports.values()] == [1, 1]
    assert fitted.describe() == "Matcher at 64 pixels; supports: blue (1), red (2)"


def test_folders_of_images_and_masks_are_paired_by_name(examples):
    fitted = predictor().fit({"red": examples / "images/red"}, {"red": examples / "masks/red"})

    assert [len(images) for images, _ in fitted.supports.values()] == [2]


def test_labels_of_several_classes_give_each_class_its_supports(tmp_path):
    label = where(BOTH, RED) + 2 * where(BOTH, BLUE).astype(np.uint8)
    save_pair(tmp_path, "both", BOTH, label)
    (tmp_path / "classes.txt").write_text("red\nblue\n")

    (result,) = predictor().fit(tmp_path).predict([BOTH])
    assert (result.mask == label).mean() > 0.9


def exif_copy(array: np.ndarray, path: Path, orientation: int = 6) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(array).save(path, exif=exif)
    return path


def test_a_picture_turned_by_exif_is_segmented_as_displayed(tmp_path):
    stored = np.rot90(BOTH).copy()  # displayed after a clockwise turn: BOTH
    fitted = red_and_blue()

    turned, straight = fitted.predict([exif_copy(stored, tmp_path / "phone.png"), BOTH])
    assert turned.mask.tolist() == straight.mask.tolist()


def test_a_support_turned_by_exif_meets_a_mask_drawn_on_the_display(tmp_path):
    path = exif_copy(np.rot90(ONE_RED).copy(), tmp_path / "phone.png")
    turned = predictor().fit([path], [where(ONE_RED, RED)])
    straight = predictor().fit([ONE_RED], [where(ONE_RED, RED)])

    assert torch.equal(turned._prototypes.foreground, straight._prototypes.foreground)


class Counting(nn.Module):
    """A method that says foreground with log-odds of the mean support colour; it counts what it gets."""

    def __init__(self, takes: int | None) -> None:
        super().__init__()
        self.backbone, self.takes, self.any_shot = colours(), takes, takes is None
        self.seen: list[tuple[int, ...]] = []

    def forward(self, episode: Episode) -> Prediction:
        shots = episode.support_images.shape[1]
        if self.takes not in (None, shots):
            raise ValueError(f"takes {self.takes} shots")
        self.seen.append(tuple(episode.query_image.shape[:1]) + (shots,))
        value = episode.support_images[:, :, 0].mean(dim=(1, 2, 3))
        foreground = value[:, None, None].expand(-1, *episode.query_image.shape[-2:])
        return Prediction(torch.stack([torch.zeros_like(foreground), foreground], dim=1))


def trained(takes: int | None, shot: int) -> FewShotPredictor:
    it = predictor()
    it.model, it.shot = Counting(takes), shot
    return it


@pytest.mark.parametrize(
    ("takes", "shot", "supports", "groups"),
    [
        (1, 1, 3, [[0], [1], [2]]),
        (5, 5, 1, [[0, 0, 0, 0, 0]]),
        (2, 2, 3, [[0, 1], [2, 0]]),
        (5, 5, 5, [[0, 1, 2, 3, 4]]),
        (None, 1, 3, [[0, 1, 2]]),
    ],
)
def test_a_head_gets_supports_in_groups_that_it_takes(takes, shot, supports, groups):
    red = [scene((RED, 8, 24, 8, 24 + k)) for k in range(supports)]
    fitted = trained(takes, shot).fit({"red": red}, {"red": [where(r, RED) for r in red]})
    fitted.model.seen.clear()

    (result,) = fitted.predict([BOTH])
    assert fitted._groups == {"red": groups}
    assert fitted.model.seen == [(1, len(group)) for group in groups]
    images, _ = fitted.supports["red"]
    average = torch.stack([images[group][:, 0].mean() for group in groups]).mean()
    torch.testing.assert_close(result.margins, torch.full_like(result.margins, average.item()))


def test_groups_are_told_where_supports_are_split(examples):
    assert trained(2, 2).fit(examples).describe().endswith("supports: blue (1), red (2)")
    told = "in groups of 1, which this head was trained for: red in 2"
    assert trained(1, 1).fit(examples).describe().endswith(told)


def run(*arguments: object):
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def test_the_command_writes_masks_overlays_and_scores(examples, queries, tmp_path):
    out = tmp_path / "out"
    result = run(queries, "--support", examples, "--output", out, "--image-size", 64, "--probabilities")

    assert result.exit_code == 0, result.output
    assert "segmented 2 pictures into" in result.output
    assert "blue in 1, red in 2" in result.output
    report = json.loads((out / "predictions.json").read_text())
    assert report["classes"] == {"1": "blue", "2": "red"}
    assert report["supports"] == {"blue": 1, "red": 2}
    assert (report["failed"], report["not_done"]) == ([], [])
    both = next(entry for entry in report["images"] if entry["image"].endswith("both.png"))
    assert (both["width"], both["height"]) == (48, 64)
    with Image.open(out / both["mask"]) as stored:
        mask = np.array(stored)
        assert stored.mode == "P"
    for name, class_id, colour in (("blue", 1, BLUE), ("red", 2, RED)):
        found = both["classes"][name]
        rows, columns = np.nonzero(mask == class_id)
        assert found["pixels"] == len(rows)
        assert found["box"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert 0.5 < found["score"] <= 1
        with Image.open(out / both[f"probability of {name}"]) as stored:
            assert np.array(stored)[where(BOTH, colour)].mean() > 128
    assert (out / "overlays/deep/red.jpg").is_file()


def test_a_bad_picture_stops_no_other_and_ends_with_status_1(examples, queries, tmp_path):
    (queries / "empty.jpg").write_bytes(b"")
    (queries / "page.png").write_text("<html>")
    (queries / "phone.heic").write_bytes(b"x")
    result = run(queries, "nowhere.jpg", "no*.png", "--support", examples, "--output", tmp_path / "out")

    assert result.exit_code == 1
    assert "segmented 2 pictures" in result.output
    report = json.loads((tmp_path / "out/predictions.json").read_text())
    failed = {Path(entry["image"]).name: entry["error"] for entry in report["failed"]}
    assert failed.keys() == {"empty.jpg", "page.png", "phone.heic", "nowhere.jpg", "no*.png"}
    for name, words in (
        ("empty.jpg", "empty, 0 bytes"),
        ("page.png", "not an image"),
        ("phone.heic", "convert it to PNG or JPEG"),
        ("nowhere.jpg", "is missing: check the name"),
        ("no*.png", "no file matches"),
    ):
        assert words in failed[name]
        assert f"failed: {name}" in result.output.replace(f"{queries}/", "")


def test_file_names_of_old_archives_are_segmented_and_told(examples, queries, tmp_path):
    """Names in Latin-1, which are no UTF-8: Python holds their bytes as surrogates."""
    good, bad = (os.fsencode(queries) + name for name in (b"/caf\xe9.png", b"/no\xebl.png"))
    Path(os.fsdecode(good)).write_bytes((queries / "both.png").read_bytes())
    Path(os.fsdecode(bad)).write_bytes(b"")
    result = run(queries, "--support", examples, "--output", tmp_path / "out", "--image-size", 64)

    assert "segmented 3 pictures" in result.output
    assert r"no\udceb" "l.png: cannot be decoded (empty" in result.output
    report = json.loads((tmp_path / "out/predictions.json").read_text(encoding="utf-8"))
    files = {os.fsencode(entry["image"]) for entry in (*report["images"], *report["failed"])}
    assert {good, bad} <= files  # JSON's escapes give the very bytes back
    masks = [os.fsencode(tmp_path / "out" / entry["mask"]) for entry in report["images"]]
    assert all(os.path.isfile(mask) for mask in masks)


def test_patterns_and_repeated_names_are_sorted_out(queries, tmp_path):
    Image.fromarray(BOTH).save(queries / "both.jpg")
    found, failed = find_queries([f"{queries}/*.png", f"{queries}/both.jpg", str(queries)], tmp_path / "out")

    assert not failed
    assert sorted(found.values()) == ["both.jpg", "both.png", "deep/red"]
    assert len(set(found.values())) == len(found)


def test_results_are_no_queries_of_the_next_time(examples, queries):
    out = queries / "results"
    for _ in range(2):
        assert run(queries, "--support", examples, "--output", out).exit_code == 0

    assert len(json.loads((out / "predictions.json").read_text())["images"]) == 2


def test_results_stay_inside_of_the_output(examples, queries, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    assert run("../queries/both.png", "--support", examples, "--output", "out").exit_code == 0
    assert Path("out/masks/both.png").is_file()


@pytest.mark.parametrize("name", ["../../../up", "/root", "..", "a/../../../beside", "nul\\..\\x"])
def test_names_of_classes_cannot_put_results_anywhere_else(queries, tmp_path, name):
    before = set(tmp_path.rglob("*"))
    fitted = predictor().fit({name: [ONE_RED]}, {name: [where(ONE_RED, RED)]})
    command.predict_files(
        fitted, {queries / "both.png": "both"}, tmp_path / "deep" / "out", probabilities=True
    )

    new = {path for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert len(list((tmp_path / "deep/out/probabilities/both").glob("*.png"))) == 1
    assert all((tmp_path / "deep" / "out") in path.parents for path in new)


def test_pairs_of_files_and_folders_are_supports_of_named_classes(examples, queries, tmp_path):
    images, masks = examples / "images", examples / "masks"
    options = [
        *("--support-image", images / "red", "--support-mask", masks / "red", "--class-name", "rot"),
        *("--support-image", images / "blue/c.png", "--support-mask", masks / "blue/c.png"),
        *("--class-name", "blau", "--output", tmp_path / "out"),
    ]
    result = run(queries / "both.png", *options)

    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out/predictions.json").read_text())
    assert report["supports"] == {"rot": 2, "blau": 1}


def test_supports_without_a_name_are_one_class(examples):
    paths = [examples / "images/red/a.png", examples / "images/red/b.png"]
    images, masks = support_pairs(paths, [examples / "masks/red/a.png", examples / "masks/red/b.png"], [])

    assert list(images) == list(masks) == ["object"]
    assert len(images["object"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either --support, or --support-image"),
        (["--support", "E", "--support-image", "x"], "either --support, or --support-image"),
        (["--support", "E", "--class-name", "red"], "--class-name goes with --support-image"),
        (["--support-image", "x.png"], "1 --support-image and 0 --support-mask; give each image its mask"),
        (["--support", "nowhere"], "nowhere does not exist: name the folder"),
        (["--support", "E/images"], "has none of the layouts"),
        (["--support-image", "x.png", "--support-mask", "y.png"], "x.png is missing"),
        (
            ["--support-image", "E/images/red", "--support-mask", "E/masks/red/a.png"],
            "is a folder and the other not",
        ),
        (["--support", "E", "--checkpoint", "nowhere"], "nowhere is not a run folder: it has no config.yaml"),
        (["--support", "E", "--image-size", "5"], "image_size is 5; use 32 pixels or more"),
        (["--support", "E", "--batch-size", "0"], "batch_size is 0; use 1 or more"),
        (["--support", "E", "--shots", "0"], "shots is 0; use 1 or more"),
        (["--support", "E", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["--support", "E", "--output", "Q/both.png"], "output=.*both.png cannot be made"),
    ],
)
def test_wrong_options_end_in_one_line(options, message, examples, queries):
    options = [
        o.replace("E", str(examples), 1) if o.startswith("E") else o.replace("Q/", f"{queries}/")
        for o in options
    ]
    result = run(queries, *options)

    assert result.exit_code == 1
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    assert re.search(message, lines[0])


def test_an_empty_folder_of_queries_is_refused(examples, tmp_path):
    (tmp_path / "none").mkdir()

    result = run(tmp_path / "none", "--support", examples)
    assert result.exit_code == 1
    assert "there is no picture to segment" in result.output
    assert "holds no images" in result.output


def test_all_bad_supports_are_named_before_anything_is_done(examples, queries, tmp_path):
    (examples / "images/red/a.png").write_bytes(b"")
    Image.new("L", (48, 64)).save(examples / "masks/red/b.png")
    result = run(queries, "--support", examples, "--output", tmp_path / "out")

    assert result.exit_code == 1
    assert "2 supports cannot be used" in result.output
    assert "a.png cannot be decoded (empty, 0 bytes)" in result.output
    assert "the mask of red marks 0 pixels" in result.output
    assert not (tmp_path / "out").exists()


def test_an_object_that_vanishes_at_the_networks_size_is_refused_with_a_remedy():
    picture = np.zeros((1000, 1000, 3), np.uint8)
    mask = np.zeros((1000, 1000), np.uint8)
    mask[501, 501] = 1

    with pytest.raises(
        ValueError, match="marks 1 pixels, too few to see: cut the picture closer to it, or raise"
    ):
        predictor().fit([picture], [mask])


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        ([ONE_RED], None, "masks are missing"),
        ([ONE_RED, ONE_RED], [where(ONE_RED, RED)], "2 images and 1 masks"),
        ({"red": [ONE_RED]}, [where(ONE_RED, RED)], "differ in form"),
        ({"red": [ONE_RED]}, {"blue": [where(ONE_RED, RED)]}, "has images or masks, but not both"),
        ([], [], "there is no support"),
        ([ONE_RED], [where(ONE_RED, RED)[:20]], "mask is 48x20 but its image is 48x64"),
        ([ONE_RED[0]], [where(ONE_RED, RED)], r"mask is 48x64 but its image is 3x48"),
        ([ONE_RED[None]], [where(ONE_RED, RED)], r"an array of shape \(1, 64, 48, 3\); it must be"),
        ([ONE_RED * 2.0], [where(ONE_RED, RED)], r"float array from 60 to 440; scale it to \[0, 1\]"),
        ([ONE_RED.astype(int) - 99], [where(ONE_RED, RED)], "holds -69 to 121; it must hold 0 to 255"),
        ([7], [where(ONE_RED, RED)], "a support is a int; give a file"),
        ([ONE_RED], [np.arange(64 * 48).reshape(64, 48) % 5], "look like class ids"),
        ([ONE_RED], [np.zeros((64, 48), bool)], "marks 0 pixels, too few to see: draw the object"),
    ],
)
def test_wrong_supports_are_refused_in_words(images, masks, message):
    with pytest.raises(ValueError, match=message):
        predictor().fit(images, masks)


def test_predicting_before_fitting_is_refused():
    with pytest.raises(ValueError, match=r"call fit\(images, masks\) first"):
        predictor().predict([BOTH])


def test_predict_raises_at_a_bad_picture_and_stream_goes_on(tmp_path):
    fitted = red_and_blue()
    with pytest.raises(FileNotFoundError, match=r"gone\.png is missing"):
        fitted.predict([BOTH, tmp_path / "gone.png"])

    results = [result for _, result in fitted.stream([BOTH, tmp_path / "gone.png", ONE_RED])]
    assert [isinstance(result, Segmentation) for result in results] == [True, False, True]


def test_a_full_disk_fails_pictures_and_is_told(examples, queries, tmp_path, monkeypatch):
    replace = os.replace

    def full(source, target):
        if "masks" in str(target) and "both" in str(target):
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    result = run(queries, "--support", examples, "--output", tmp_path / "out")
    report = json.loads((tmp_path / "out/predictions.json").read_text())
    assert result.exit_code == 1
    assert [Path(entry["image"]).name for entry in report["images"]] == ["red.png"]
    assert "No space left on device" in report["failed"][0]["error"]
    assert not list((tmp_path / "out").rglob("*both*"))  # nothing half-written


def test_an_interruption_leaves_an_account_of_what_was_done(examples, queries, tmp_path, monkeypatch):
    fitted = predictor(batch_size=1).fit(examples)
    write = command._write

    def interrupted(result, name, *rest):
        if "red" in name:
            raise KeyboardInterrupt
        return write(result, name, *rest)

    monkeypatch.setattr(command, "_write", interrupted)
    found, _ = find_queries([str(queries)], tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        command.predict_files(fitted, found, tmp_path / "out")
    report = json.loads((tmp_path / "out/predictions.json").read_text())
    assert len(report["images"]) == 1
    assert report["not_done"] == [str(queries / "deep/red.png")]


def test_a_run_whose_data_is_gone_still_predicts(tmp_path, examples):
    """The classes of a folder are known from its files, but a prediction needs none of them."""
    folder = tmp_path / "run"
    shutil.copytree(EARLIER_RUN, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    lost = str(tmp_path / "lost_photos")
    config["data"]["source"] = {"_target_": "svf_lightning.data.folder.Folder", "root": lost}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(FileNotFoundError, match="lost_photos does not exist"):
        load_run(folder)  # asks for the classes under test

    it = FewShotPredictor(folder, device="cpu").fit(examples)
    assert it.letterbox.size == config["data"]["image_size"] == 65
    assert it.predict([BOTH])[0].mask.shape == (64, 48)
