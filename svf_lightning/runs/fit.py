"""Train a run: one road for a method and for BAM's base learner."""

import logging
import signal
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from svf_lightning.runs.configuration import Config, write_config
from svf_lightning.runs.folder import keep_curves, move_earlier_results, resume_point
from svf_lightning.runs.run import build_all, build_trainer
from svf_lightning.training.callbacks import LogHyperparameters
from svf_lightning.training.saving import SIGNALS, Stopped

log = logging.getLogger("svf")


def begin(config: Config) -> Path | None:
    """Make the run's folder ready, save its configuration there, and seed all that is drawn globally.

    Returns:
        The checkpoint to go on from, if any.
    """
    folder = Path(config["run_dir"])
    resume = resume_point(folder, config["resume"])
    if resume is None:
        move_earlier_results(folder)
    else:
        keep_curves(folder)
    write_config(folder, config)
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    return resume


def fit(
    config: Config,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    resume: Path | None,
    **trainer_changes: Any,
) -> pl.Trainer:
    """Train. SIGTERM, SIGUSR1 and Ctrl-C save the state, then end the process with 128 + their number.

    Args:
        config: Of the run, whose callbacks and loggers are built here.
        module: What is trained.
        data: What it is trained on.
        resume: The checkpoint to go on from, as :func:`begin` gives it.
        trainer_changes: Arguments of the Trainer that differ from the configuration.

    Returns:
        The Trainer, with which the test can go on.
    """
    callbacks = [*build_all(config, "callbacks"), LogHyperparameters(config)]
    trainer = build_trainer(config, callbacks, logger=build_all(config, "logger"), **trainer_changes)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except Stopped as stopped:
        log.warning("stopped by %s after step %s; `resume=last` goes on there", stopped, trainer.global_step)
        sys.exit(128 + stopped.number)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return trainer
