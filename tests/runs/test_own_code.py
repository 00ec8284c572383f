"""A method and a strategy outside of the repository: the files that docs/adding_a_method.md shows."""

import json
import re
from pathlib import Path

import pytest

import evaluate
from svf_lightning.runs.configuration import load_config
from svf_lightning.runs.run import load_run
from tests.conftest import TINY
from train import main

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_method.md"
TINY_DATA = [override for override in TINY if override.startswith("data.")]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The folder of the page's files; its code can be imported, as by PYTHONPATH=my_code."""
    for name, text in re.findall(r"```(?:python|yaml)\n# (my_\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "my_code")
    return tmp_path


@pytest.fixture
def train_own(call, emoji_folder, own):
    def train_own(*choices):
        folders = [f"data_dir={emoji_folder}", f"hydra.run.dir={own / 'run'}"]
        call(main, "--config-dir", own / "my_conf", *TINY_DATA, *folders, *choices)
        return own / "run"

    return train_own


def test_two_files_outside_the_repository_train_by_the_built_in_recipe_and_are_tested(train_own, call):
    run = train_own("model=mine")
    config = load_config(run)
    assert (config["epochs"], config["selection"], config["model"]["optimizer"]) == (6, "last", "adamw")
    assert json.loads((run / "metrics.json").read_text())["trainable"]["head"] > 0
    call(evaluate.main, f"run={run}", "episodes=3", "shot=2", "trust=[my_method]")
    assert 0 <= json.loads((run / "evaluation.json").read_text())["seeds"][0]["miou"] <= 1


def test_a_recipe_beside_the_method_comes_after_the_built_in_one(train_own, own):
    recipe = own / "my_conf" / "recipe" / "emoji" / "mine.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("# @package _global_\nepochs: 1\nmodel:\n  lr: 0.25\n")
    config = load_config(train_own("model=mine", "test=false"))
    assert (config["epochs"], config["model"]["lr"], config["model"]["optimizer"]) == (1, 0.25, "adamw")


def test_a_strategy_outside_the_repository_decides_what_trains(train_own):
    _, segmenter = load_run(
        train_own("model=mine", "finetune=last", "epochs=1", "test=false"), trust=["my_method", "my_strategy"]
    )
    trained = {
        name.split(".")[0] for name, p in segmenter.model.backbone.named_parameters() if p.requires_grad
    }
    assert trained == {"layer3"}


def test_a_run_with_a_method_of_somebodys_own_is_not_opened_without_trust(tmp_path, train, call, capsys):
    run = train(tmp_path / "run", "epochs=1", "test=false")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("svf_lightning.models.baseline.Baseline", "their_code.Net"))
    with pytest.raises(SystemExit):
        call(evaluate.main, f"run={run}")
    assert "wants to call 'their_code.Net' (model.network)" in capsys.readouterr().err
