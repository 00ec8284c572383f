"""What Lightning, logging and checkpoints add to a training step of the main job.

    python benchmarks/overhead.py [steps]

The same model, episodes and optimizer step by step in a bare loop, and under the Trainer as train.py sets it
up. Both load episodes in the process that trains; process CPU time, so that a busy machine does not count.
"""

import sys
import tempfile
import time
from pathlib import Path

import pytorch_lightning as pl

from svf_lightning import runs
from svf_lightning.callbacks import EpisodeProgress, Finetune


class Clock(pl.Callback):
    """Remember when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.ends.append(time.process_time())


def main(steps: int) -> None:
    folder = Path(tempfile.mkdtemp())
    config = runs.compose([f"data.episodes_per_epoch={8 * steps}", "epochs=1"], folder)
    segmenter, data = runs.build(config)
    clock = Clock()
    arguments = {**runs.trainer_arguments(config), "limit_val_batches": 0}
    callbacks = [Finetune(runs.build_strategy(config)), EpisodeProgress(), clock]
    trainer = pl.Trainer(**arguments, logger=runs.build_loggers(config), callbacks=callbacks)
    trainer.fit(segmenter, datamodule=data)
    trained = (clock.ends[-1] - clock.ends[0]) / (steps - 1)

    optimizer = segmenter.optimizers(use_pl_optimizer=False)
    segmenter.train()
    ends = []
    for episode in data.train_dataloader():
        optimizer.zero_grad()
        segmenter.loss(segmenter(episode), episode).backward()
        optimizer.step()
        ends.append(time.process_time())
    bare = (ends[-1] - ends[0]) / (steps - 1)
    print(f"bare loop {bare:.4f} s/step, train.py {trained:.4f} s/step: {100 * (trained / bare - 1):+.1f} %")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
