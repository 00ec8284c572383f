"""Everything works without Hydra, as docs/notebook.md shows."""

import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from svf_lightning import FewShotSegmenter
from svf_lightning.training.checkpoints import load_checkpoint

PAGE = Path(__file__).parent.parent / "docs" / "notebook.md"


def test_the_page_trains_tests_saves_loads_and_predicts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(snippet, names)
        if "first" not in names:
            names["first"] = names["masks"]

    assert 0 <= names["scores"][0]["test/miou"] <= 1
    labels = [label for _, labels in names["data"].test_dataloader() for label in labels]
    masks = [mask for batch in names["first"] for mask in batch]
    assert [mask.shape for mask in masks] == [label.shape for label in labels]
    assert [[mask.shape for mask in batch] for batch in names["masks"]] == [[(65, 65)] * 2] * 2


@pytest.fixture(scope="module")
def run(tmp_path_factory, emoji_folder):
    """A finished tiny run of train.py."""
    from tests.conftest import TINY
    from train import main

    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", *TINY, f"data_dir={emoji_folder}", f"hydra.run.dir={folder}"])
        main()
    return folder


def test_a_runs_checkpoint_alone_builds_the_trained_model_again(run, emoji_folder):
    from svf_lightning import load_run

    trained = load_run(run)[1]
    alone = FewShotSegmenter.load_from_checkpoint(run / "checkpoints" / "last.ckpt")

    state = alone.state_dict()
    assert state.keys() == trained.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in trained.state_dict().items())
    assert (alone.lr, alone.schedule) == (trained.lr, trained.schedule)
    assert alone.loss.keywords == trained.loss.keywords
    assert not alone.training


def test_a_checkpoint_that_does_not_know_its_network_asks_for_it(run, tmp_path):
    content = load_checkpoint(run / "checkpoints" / "last.ckpt")
    torch.save({**content, "configuration": {}}, tmp_path / "mine.ckpt")
    with pytest.raises(ValueError, match=r"mine.ckpt does not say how to build its network"):
        FewShotSegmenter.load_from_checkpoint(tmp_path / "mine.ckpt")


@pytest.mark.parametrize(
    "target",
    ["torch.utils.collect_env.run", "svf_lightning.data.emoji.json.loads", "os.system", "my_module.Network"],
)
def test_a_checkpoint_calls_nothing_but_parts_of_a_run(run, tmp_path, target):
    content = load_checkpoint(run / "checkpoints" / "last.ckpt")
    content["configuration"]["finetune"] = {"_target_": target, "command": f"touch {tmp_path}/called"}
    torch.save(content, tmp_path / "hostile.ckpt")
    with pytest.raises(ValueError, match=rf"hostile.ckpt wants to call '{target}' \(finetune\)"):
        FewShotSegmenter.load_from_checkpoint(tmp_path / "hostile.ckpt")
    assert not (tmp_path / "called").exists()


def test_a_module_that_is_trusted_by_name_may_be_called(run, tmp_path, monkeypatch):
    (tmp_path / "my_strategies.py").write_text("def prepare(backbone):\n    backbone.requires_grad_(False)\n")
    monkeypatch.syspath_prepend(tmp_path)
    content = load_checkpoint(run / "checkpoints" / "last.ckpt")
    content["configuration"]["finetune"] = {"_target_": "my_strategies.prepare", "_partial_": True}
    torch.save(content, tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match=r"own.ckpt does not fit this network"):  # not factored, but called
        FewShotSegmenter.load_from_checkpoint(tmp_path / "own.ckpt", trust=["my_strategies"])


def test_the_data_module_sets_up_all_stages_at_once(run, emoji_folder):
    from svf_lightning.runs.configuration import load_config
    from svf_lightning.runs.run import build_data

    data = build_data(load_config(run))
    data.setup()
    assert {len(data.val_set), len(data.test_set)} == {4, 6}
    assert len(data.train_set) > 0


def test_a_loader_without_a_data_module_needs_the_classes_by_name(run):
    segmenter = FewShotSegmenter.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    trainer = pl.Trainer(logger=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match="which classes are scored"):
        trainer.test(segmenter, DataLoader([0]), verbose=False)
