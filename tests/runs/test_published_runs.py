"""The published data sets, made small in their true layouts: prepare, check, train and evaluate."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import evaluate
from svf_lightning.cli import app
from svf_lightning.data.folds import COCO_CLASSES, PASCAL_CLASSES
from tests.made_coco import make_coco
from tests.made_fss import make_fss
from tests.made_voc import make_archives

TINY = [
    "data.image_size=65",
    "data.batch_size=4",
    "data.episodes_per_epoch=8",
    "data.val_episodes=4",
    "data.test_episodes=12",
    "model.network.channels=8",
    "epochs=2",
]


def svf(*arguments: object) -> str:
    """Run the ``svf`` command and give what it printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def pascal(folder: Path) -> tuple[Path, list[str], set[str]]:
    voc, sbd = make_archives(folder, images=40)
    assert "test list" in svf("prepare", "pascal", "--voc", voc, "--sbd", sbd, "--out", folder / "VOC2012")
    return folder / "VOC2012", ["fold=1"], set(PASCAL_CLASSES[5:10])


def coco(folder: Path) -> tuple[Path, list[str], set[str]]:
    make_coco(folder / "from")
    options = ("--images", folder / "from", "--annotations", folder / "from", "--out", folder / "coco")
    assert "val2014 with objects: 160 images" in svf("prepare", "coco", *options)
    return folder / "coco", ["fold=2", "data.source.min_pixels=1000"], set(COCO_CLASSES[2::4])


def fss1000(folder: Path) -> tuple[Path, list[str], set[str]]:
    lists = make_fss(folder / "fss")
    return folder / "fss", [], set(lists["test"])


@pytest.mark.slow
@pytest.mark.parametrize("made", [pascal, coco, fss1000])
def test_a_made_data_set_trains_and_is_evaluated(made, tmp_path, call, monkeypatch):
    from train import main

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))
    root, overrides, novel = made(tmp_path)
    assert "0 errors" in svf("check", root, "--sheet", tmp_path / "sheet.png")
    run = tmp_path / "run"
    data = [f"data={made.__name__}", f"data.source.root={root}", *overrides]
    call(main, *data, *TINY, f"hydra.run.dir={run}")
    result = json.loads((run / "metrics.json").read_text())
    assert set(result["class_iou"]) == novel
    assert result["protocol"]["episodes"] == 12

    call(evaluate.main, f"run={run}", "shot=1", "episodes=12")
    again = json.loads((run / "evaluation.json").read_text())
    assert again["miou_mean"] == pytest.approx(result["miou"])
    assert len(again["seeds"]) == 1
