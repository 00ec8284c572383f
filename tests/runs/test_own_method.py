"""A method of the user's own is two files, wherever they lie."""

import json

import pytest

import evaluate
from tests.conftest import TINY
from train import main

METHOD = """
from svf_lightning.models.cosine import Cosine

class Mine(Cosine):
    pass
"""
YAML = """
# @package _global_
model:
  _target_: svf_lightning.training.segmenter.FewShotSegmenter
  network:
    _target_: own_method_of_a_test.Mine
    backbone: ${backbone}
    stage: 2
  epochs: ${epochs}
"""


def test_two_files_elsewhere_train_with_the_recipe_of_the_data_set_and_are_tested(
    tmp_path, monkeypatch, call, emoji_folder, capsys
):
    (tmp_path / "own_method_of_a_test.py").write_text(METHOD)
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(YAML)
    monkeypatch.syspath_prepend(tmp_path)
    tiny = [override for override in TINY if not override.startswith(("model.", "epochs"))]
    run = tmp_path / "run"

    call(
        main,
        *("--config-dir", tmp_path / "conf", "model=mine", *tiny),
        *(f"data_dir={emoji_folder}", f"hydra.run.dir={run}", "trainer.max_epochs=1"),
    )

    config = json.loads((run / "metrics.json").read_text())["config"]
    assert config["epochs"] == 6
    assert config["selection"] == "last"
    assert config["model"]["optimizer"] == "adamw"
    call(evaluate.main, f"run={run}", "trust=[own_method_of_a_test]")
    again = json.loads((run / "evaluation.json").read_text())["miou_mean"]
    assert again == json.loads((run / "metrics.json").read_text())["miou"]


def test_a_run_with_a_method_of_somebodys_own_is_not_opened_without_trust(tmp_path, train, call, capsys):
    run = train(tmp_path / "run", "epochs=1", "test=false")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("svf_lightning.models.baseline.Baseline", "their_code.Net"))
    with pytest.raises(SystemExit):
        call(evaluate.main, f"run={run}")
    assert "wants to call 'their_code.Net' (model.network)" in capsys.readouterr().err
