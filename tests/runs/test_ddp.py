"""Two processes on the CPU compute what one does, resumed or not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svf_lightning.runs.configuration import is_distributed
from svf_lightning.training.checkpoints import load_checkpoint
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]


def run(folder, data, *overrides, ok=True):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *TINY, f"data_dir={data}", f"hydra.run.dir={folder}", *overrides],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(folder.parent)},
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_test_the_same(emoji_folder, tmp_path):
    """The same global batch: two of two episodes, and one of four."""
    options = ["test=true", "data.test_episodes=7", "epochs=2"]  # 7: the processes get unequal shares
    options += ["model.optimizer=sgd", "model.lr=0.01"]  # Adam makes steps of noise where gradients are tiny
    run(tmp_path / "one", emoji_folder, *options)
    run(tmp_path / "two", emoji_folder, *options, *TWO, "data.batch_size=2")
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert two["protocol"] == one["protocol"]
    expected, ours = (
        torch.cat(
            [value.flatten().double() for key, value in sorted(state.items()) if key.endswith(".weight")]
        )
        for name in ("one", "two")
        for state in [load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"]]
    )
    # Not within rounding: a process divides by its own pixels, and ignored ones are not spread evenly.
    assert (ours - expected).norm() <= 1e-4 * expected.norm()

    # A trained model scores the same to the last digit, however many processes share the episodes.
    trained = ["epochs=0", f"init_from={tmp_path / 'one'}"]
    run(tmp_path / "again1", emoji_folder, *options, *trained)
    run(tmp_path / "again2", emoji_folder, *options, *trained, *TWO)
    again1, again2 = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("again1", "again2")
    )
    assert again1["class_iou"] == again2["class_iou"]
    assert again1["fb_iou"] == again2["fb_iou"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_resume_exactly(emoji_folder, tmp_path, workers):
    options = ["test=false", "data.batch_size=2", "epochs=2", *TWO, f"workers={workers}"]
    run(tmp_path / "whole", emoji_folder, *options)
    run(tmp_path / "parts", emoji_folder, *options, "trainer.max_epochs=1")
    run(tmp_path / "parts", emoji_folder, *options, "resume=last")
    whole, parts = (
        load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"]
        for name in ("whole", "parts")
    )
    for key, value in whole.items():
        assert torch.equal(parts[key], value), key


@pytest.mark.slow
def test_a_missing_base_learner_is_one_line_before_any_process_starts(emoji_folder, tmp_path):
    done = run(tmp_path / "bam", emoji_folder, "model=bam", *TWO, ok=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "no base learner in" in errors[0]
    assert "run the same command with task=base first" in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({"devices": 1}, False),
        ({"devices": "auto"}, False),
        ({"devices": [0]}, False),
        ({"devices": 2}, True),
        ({"devices": [0, 1]}, True),
        ({"devices": 1, "num_nodes": 2}, True),
        ({"strategy": "ddp_find_unused_parameters_true"}, True),
        ({"strategy": {"_target_": "pytorch_lightning.strategies.DDPStrategy"}, "devices": "auto"}, True),
    ],
)
def test_several_processes_are_recognised_in_whatever_way_they_are_asked_for(trainer, expected):
    assert is_distributed({"trainer": trainer}) is expected
