"""Every data set in its true layout, made small, through the commands that its user types."""

import json
import math
import tarfile

import pytest
from typer.testing import CliRunner

import evaluate
import train as training
from svf_lightning.cli import app
from svf_lightning.data.folds import COCO_CLASSES, PASCAL_CLASSES
from tests.made_coco import make_coco
from tests.made_folder import make_folder
from tests.made_fss import make_fss
from tests.made_voc import make_archives

SHORT = [
    "data.image_size=65",
    "data.batch_size=4",
    "data.episodes_per_epoch=8",
    "data.val_episodes=4",
    "data.test_episodes=6",
    "model.network.channels=8",
    "epochs=2",
]


@pytest.fixture(autouse=True)
def _own_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))


@pytest.fixture
def train_and_evaluate(call, tmp_path):
    """Both results of a short run on a data set."""

    def both(*overrides):
        run = tmp_path / "run"
        call(training.main, *SHORT, f"hydra.run.dir={run}", *overrides)
        call(evaluate.main, f"run={run}", "workers=1")
        return tuple(json.loads((run / f"{name}.json").read_text()) for name in ("metrics", "evaluation"))

    return both


def svf(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.output


def assert_scores_of(results, novel):
    """Both commands score the novel classes, and nothing else, and score them equally."""
    tested, evaluated = results
    assert set(tested["class_iou"]) == set(novel)
    assert tested["class_iou"] == evaluated["seeds"][0]["class_iou"]
    assert all(math.isfinite(iou) and 0 <= iou <= 1 for iou in tested["class_iou"].values())
    assert 0 < tested["fb_iou"] <= 1


def test_voc_and_sbd_from_their_archives_to_a_score(train_and_evaluate, tmp_path):
    make_archives(tmp_path / "unpacked", images=40)
    for archive, folder in (("voc.tar", "VOCdevkit"), ("sbd.tgz", "benchmark_RELEASE")):
        with tarfile.open(tmp_path / archive, "w:gz" if archive.endswith("tgz") else "w") as tar:
            tar.add(tmp_path / "unpacked" / folder, folder)
    root = tmp_path / "datasets/VOC2012"

    prepared = svf(
        "prepare", "pascal", "--voc", tmp_path / "voc.tar", "--sbd", tmp_path / "sbd.tgz", "--out", root
    )
    checked = svf("check", root, "--sheet", tmp_path / "sheet.png")
    results = train_and_evaluate("data=pascal", f"data_dir={tmp_path / 'datasets'}", "fold=2")

    assert "training list, both without duplicates: 78 images, DIFFERS: published 5953" in prepared
    assert "118 usable images of 20 classes" in checked
    assert_scores_of(results, PASCAL_CLASSES[10:15])


def test_coco_from_its_folders_to_a_score(train_and_evaluate, tmp_path):
    source, root = tmp_path / "downloads", tmp_path / "datasets/coco"
    make_coco(source, side=100)

    prepared = svf(
        *("prepare", "coco", "--images", source / "train2014", "--images", source / "val2014"),
        *("--annotations", source / "annotations", "--out", root),
    )
    checked = svf("check", root, "--sheet", tmp_path / "sheet.png")
    results = train_and_evaluate("data=coco", f"data_dir={tmp_path / 'datasets'}", "fold=1")

    assert "train2014 with objects: 160 images, DIFFERS: published 82081" in prepared
    assert "320 usable images of 80 classes" in checked
    assert_scores_of(results, COCO_CLASSES[1::4])  # interleaved


def test_fss1000_from_its_folder_to_a_score(train_and_evaluate, tmp_path):
    lists = make_fss(tmp_path / "datasets/fss1000")

    checked = svf("check", tmp_path / "datasets/fss1000", "--sheet", tmp_path / "sheet.png")
    results = train_and_evaluate("data=fss1000", f"data_dir={tmp_path / 'datasets'}")

    assert "100 usable images of 10 classes" in checked
    assert_scores_of(results, lists["test"])


@pytest.mark.parametrize(
    ("layout", "novel"), [("folders", ["leaf"]), ("indexed", ["leaf", "star"]), ("coco", ["star", "leaf"])]
)
def test_own_images_from_their_folder_to_a_score(layout, novel, train_and_evaluate, tmp_path):
    make_folder(tmp_path / "photos", layout, images=4, size=64)

    svf("check", tmp_path / "photos", "--sheet", tmp_path / "sheet.png")
    results = train_and_evaluate(
        "data=folder", f"data.root={tmp_path / 'photos'}", f"data.novel=[{','.join(novel)}]"
    )

    assert_scores_of(results, novel)
