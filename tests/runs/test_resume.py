"""What a resume may change, what it refuses, and what it does where the user insists."""

import json
import re

import pytest
import torch
import yaml
from pytorch_lightning import Callback, LightningModule, Trainer

from svf_lightning.runs.contract import differences
from svf_lightning.runs.run import load_run
from svf_lightning.training.checkpoints import load_checkpoint

HALF = ("epochs=4", "trainer.max_epochs=2", "test=false")
WHOLE = ("epochs=4", "resume=last", "test=false")


@pytest.fixture(scope="module")
def half(tmp_path_factory, emoji_folder):
    """A run that stopped after two of four epochs."""
    from tests.conftest import TINY
    from train import main

    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        arguments = [*TINY, *HALF, f"data_dir={emoji_folder}", f"hydra.run.dir={folder}"]
        patch.setattr("sys.argv", ["train.py", *arguments])
        main()
    return folder


def copy(half, target):
    import shutil

    return shutil.copytree(half, target)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.lr=0.0001", "model.lr is 0.005 in the run and 0.0001 now"),
        ("model.weight_decay=0.5", "model.weight_decay is 0.01 in the run and 0.5 now"),
        ("model.optimizer=sgd", "model.optimizer is 'adamw' in the run and 'sgd' now"),
        ("model.network.channels=32", "model.network.channels is 8 in the run and 32 now"),
        ("finetune.stages=[layer4]", "finetune.stages is ['layer2', 'layer3', 'layer4'] in the run"),
        ("finetune=frozen", "finetune is 'svf' in the run and 'frozen' now; start"),
        ("seed=3", "seed is 0 in the run and 3 now"),
        ("fold=1", "fold is 0 in the run and 1 now"),
        ("shot=2", "shot is 1 in the run and 2 now"),
        ("data.batch_size=2", "data.batch_size is 4 in the run and 2 now"),
        ("data.augment.blur_p=0.3", "data.augment.blur_p is 0 in the run and 0.3 now"),
        ("data.image_size=97", "data.image_size is 65 in the run and 97 now"),
        ("model.schedule=poly", "model.schedule is 'cosine' in the run and 'poly' now"),
        ("epochs=3", "epochs is 4 in the run and 3 now"),
        ("backbone.zoom=2", "backbone.zoom is 1.5 in the run and 2 now"),
        ("+trainer.gradient_clip_val=1", "trainer.gradient_clip_val is None in the run and 1 now"),
    ],
)
def test_what_defines_a_run_is_refused_by_name_and_the_run_is_left_as_it_was(
    half, train, capsys, override, message
):
    before = {p: p.read_bytes() for p in half.rglob("*") if p.is_file() and ".hydra" not in p.parts}
    overrides = [o for o in WHOLE if o.split("=")[0] != override.split("=")[0]]
    with pytest.raises(SystemExit):
        train(half, *overrides, override)
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    after = {p: p.read_bytes() for p in half.rglob("*") if p.is_file() and ".hydra" not in p.parts}
    after = {p: content for p, content in after.items() if p.name != "train.log"}
    assert after == {p: content for p, content in before.items() if p.name != "train.log"}
    load_run(half)  # can still be evaluated


def test_what_is_free_is_applied_and_told(half, train, tmp_path, capsys):
    folder = copy(half, tmp_path / "run")
    train(folder, *WHOLE, "trainer.log_every_n_steps=1", "data.test_episodes=3", "logger=none")
    said = capsys.readouterr().out
    assert "resume: trainer.log_every_n_steps is 10 in the run and 1 now, applied" in said
    assert "resume: data.test_episodes is 6 in the run and 3 now, applied" in said
    assert load_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 8
    assert not (folder / "history.json").exists()


class Rates(Callback):
    """Remember rate and decay of every group at every step."""

    seen: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        group = trainer.optimizers[0].param_groups[0]
        Rates.seen.append((group["lr"], group["weight_decay"]))


def test_a_new_rate_and_decay_are_in_force_where_the_user_insists(half, train, tmp_path):
    folder = copy(half, tmp_path / "run")
    Rates.seen.clear()
    train(
        folder,
        *(*WHOLE[:2], "resume_changes=allow", "model.lr=0.0001", "model.weight_decay=0.5"),
        *("+callbacks.rates={_target_: tests.runs.test_resume.Rates}", "test=true"),
    )
    # Cosine of 8 steps, at 4 to 7: 0.5 (1 + cos(pi t / 8)).
    expected = [0.5e-4, 0.5e-4 * (1 - 0.3826834), 0.5e-4 * (1 - 0.7071068), 0.5e-4 * (1 - 0.9238795)]
    assert [rate for rate, _ in Rates.seen] == pytest.approx(expected, rel=1e-5)
    assert {decay for _, decay in Rates.seen} == {0.5}
    (entry,) = json.loads((folder / "history.json").read_text())
    assert entry["changed"]["model.lr"] == [0.005, 0.0001]
    assert json.loads((folder / "metrics.json").read_text())["history"] == [entry]
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["lr"] == 0.0001


def test_structure_is_refused_even_where_the_user_insists(half, train, capsys):
    with pytest.raises(SystemExit):
        train(half, *WHOLE, "resume_changes=allow", "model.network.channels=32")
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "model.network.channels is 8 in the run and 32 now; start a new run, with init_from=RUN" in message


def test_a_longer_run_follows_the_longer_schedule(half, train, tmp_path):
    folder = copy(half, tmp_path / "run")
    Rates.seen.clear()
    rates = "+callbacks.rates={_target_: tests.runs.test_resume.Rates}"
    train(folder, "epochs=8", "trainer.max_epochs=3", "resume=last", "test=false", rates)
    assert [rate for rate, _ in Rates.seen] == pytest.approx(
        [0.0025 * (1 + 0.7071068), 0.0025 * (1 + 0.5555702)], rel=1e-5
    )


def test_another_strategy_begins_with_the_weights_of_a_run(half, train, tmp_path, capsys):
    folder = train(tmp_path / "new", "finetune=frozen", "epochs=0", f"init_from={half}", "test=false")
    said = capsys.readouterr().out
    taken, every = map(int, re.search(r"took (\d+) of (\d+) tensors", said).groups())
    assert taken == every
    ours, theirs = load_run(folder)[1], load_run(half)[1]
    x = torch.rand(1, 3, 65, 65)
    for a, b in zip(ours.model.backbone(x), theirs.model.backbone(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.model.cls_meta[0].weight, theirs.model.cls_meta[0].weight)


def test_what_does_not_fit_is_told_and_left(half, train, tmp_path, capsys):
    train(tmp_path / "new", "model.network.channels=12", "epochs=1", f"init_from={half}", "test=false")
    said = capsys.readouterr().out
    assert re.search(r"\d+ have another shape there: down_query.0.weight", said)


def test_differences_name_values_that_are_on_one_side_only():
    changes = differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": {}}, "e": [1]})
    assert [tuple(change) for change in changes] == [("a.c", 2, None), ("e", None, [1])]


class Poison(Callback):
    """Make the loss of one step infinite."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.model.cls_meta[0].weight.fill_(float("inf"))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(train, tmp_path, capsys):
    poison = "+callbacks.poison={_target_: tests.runs.test_resume.Poison, step: 3}"
    with pytest.raises(SystemExit):
        train(tmp_path / "run", "epochs=2", poison)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: the loss is nan at step 3 \(epoch 2\) with learning rates [\d.e-]+, ", message)
    good = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert good["global_step"] == 2
    assert all(value.isfinite().all() for value in good["state_dict"].values())
    assert not (tmp_path / "run" / "metrics.json").exists()
