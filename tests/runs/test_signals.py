"""A training that is told to stop saves first, and goes on where it was, in the middle of an epoch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Callback, Trainer

from svf_lightning.training.checkpoints import load_checkpoint
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
LONGER = ["data.episodes_per_epoch=160", "epochs=2", "test=false", "logger=none", "callbacks.spectra=null"]


def start(folder, data, *overrides):
    command = [sys.executable, "-u", ROOT / "train.py", *TINY, *LONGER, f"data_dir={data}"]
    return subprocess.Popen(
        [*map(str, command), f"hydra.run.dir={folder}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(folder.parent)},
    )


def step(folder):
    return load_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stop_in_the_middle_of_an_epoch_changes_nothing_in_the_end(emoji_folder, tmp_path, workers):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with start(whole, emoji_folder) as process:
        print(process.communicate()[0])
        assert process.returncode == 0
    assert step(whole) == 80  # two epochs of 40 steps

    stops = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with start(parts, emoji_folder, f"workers={workers}", *(["resume=last"] if stops else [])) as process:
            for line in process.stdout:
                if "numbers train" in line:
                    break
            time.sleep(1.5)
            process.send_signal(number)
            said = process.communicate()[0]
            assert process.returncode == 128 + number, said
            stops.append(step(parts))
            assert f"stopped by {number.name} after step {stops[-1]}" in said
    assert 0 < stops[0] < stops[1] < 80
    assert any(stop % 40 for stop in stops)
    with start(parts, emoji_folder, f"workers={workers}", "resume=last") as process:
        print(process.communicate()[0])
        assert process.returncode == 0

    ours, expected = (load_checkpoint(run / "checkpoints" / "last.ckpt") for run in (parts, whole))
    assert ours["global_step"] == 80
    for key, value in expected["state_dict"].items():
        assert torch.equal(ours["state_dict"][key], value), key


def test_a_save_within_an_epoch_is_gone_on_with_exactly(train, tmp_path):
    options = ("data.episodes_per_epoch=16", "epochs=2", "test=false")
    whole = train(tmp_path / "whole", *options)
    stopping = "{_target_: tests.runs.test_signals.StopAfter, steps: 6}"
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "parts", *options, f"+callbacks.stopping={stopping}")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert step(tmp_path / "parts") == 6  # the second of the second epoch's four
    parts = train(tmp_path / "parts", *options, "resume=last")
    ours, expected = (load_checkpoint(run / "checkpoints" / "last.ckpt") for run in (parts, whole))
    for key, value in expected["state_dict"].items():
        assert torch.equal(ours["state_dict"][key], value), key


class StopAfter(Callback):
    """Send this very process a signal after some steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
