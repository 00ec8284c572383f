"""`svf benchmark overhead`: what Lightning, logging and checkpoints add to a training step.

    svf benchmark overhead --steps 30

The same model, episodes and optimizer step by step in a bare loop, and under the Trainer as train.py sets it
up. Both load episodes in the process that trains; process CPU time, so that a busy machine does not count.
"""

import tempfile
import time
from pathlib import Path

import pytorch_lightning as pl

from svf_lightning.runs.configuration import compose
from svf_lightning.runs.run import build, build_all, build_part, build_trainer
from svf_lightning.training.callbacks import EpisodeProgress, Finetune


class Clock(pl.Callback):
    """Remember when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.ends.append(time.process_time())


def run(steps: int) -> str:
    """Train some steps both ways and say how their times compare.

    Args:
        steps: Of training, 2 or more.

    Raises:
        ValueError: If there are fewer than 2.
    """
    if steps < 2:
        raise ValueError(f"--steps must be 2 or more, got {steps}")
    folder = Path(tempfile.mkdtemp())
    config = compose([f"data.episodes_per_epoch={8 * steps}", "epochs=1"], folder)
    segmenter, data = build(config)
    clock = Clock()
    callbacks = [Finetune(build_part(config, "finetune")), EpisodeProgress(), clock]
    trainer = build_trainer(config, callbacks, logger=build_all(config, "logger"), limit_val_batches=0)
    trainer.fit(segmenter, datamodule=data)
    trained = (clock.ends[-1] - clock.ends[0]) / (steps - 1)

    optimizer = trainer.optimizers[0]
    segmenter.train()
    ends = []
    for episode in data.train_dataloader():
        optimizer.zero_grad()
        segmenter.loss(segmenter(episode), episode).backward()
        optimizer.step()
        ends.append(time.process_time())
    bare = (ends[-1] - ends[0]) / (steps - 1)
    return f"bare loop {bare:.4f} s/step, train.py {trained:.4f} s/step: {100 * (trained / bare - 1):+.1f} %"
