"""Train a run: one road for a method and for BAM's base learner."""

import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl

from svf_lightning.files import write_whole
from svf_lightning.runs.configuration import Config, write_config
from svf_lightning.runs.contract import Change, check_resume
from svf_lightning.runs.folder import keep_curves, move_earlier_results, resume_point
from svf_lightning.runs.run import build_all, build_trainer
from svf_lightning.training.callbacks import LogHyperparameters, StopAtNonFinite, TakeNewRecipe
from svf_lightning.training.checkpoints import load_checkpoint
from svf_lightning.training.saving import SIGNALS, Stopped

log = logging.getLogger("svf")


class Start(NamedTuple):
    """Where a training begins."""

    checkpoint: Path | None  # to go on from
    changes: list[Change]  # of what defines the run, since that checkpoint


def begin(config: Config) -> Start:
    """Find out where the training begins, and seed all that is drawn globally. Writes nothing.

    Raises:
        ValueError: If the checkpoint is damaged, or its run was defined otherwise.
    """
    checkpoint = resume_point(Path(config["run_dir"]), config["resume"])
    changes = [] if checkpoint is None else check_resume(config, checkpoint)
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    return Start(checkpoint, changes)


def fit(
    config: Config,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    start: Start,
    **trainer_changes: Any,
) -> pl.Trainer:
    """Train. SIGTERM, SIGUSR1 and Ctrl-C save the state, then end the process with 128 + their number.

    The run's folder is written when everything is built, so a wrong value leaves an earlier run as it was.

    Args:
        config: Of the run, whose callbacks and loggers are built here.
        module: What is trained.
        data: What it is trained on.
        start: Where it begins, as :func:`begin` gives it.
        trainer_changes: Arguments of the Trainer that differ from the configuration.

    Returns:
        The Trainer, with which the test can go on.

    Raises:
        ValueError: If the loss is no longer finite.
    """
    callbacks = [*build_all(config, "callbacks"), StopAtNonFinite(), LogHyperparameters(config)]
    if start.checkpoint is not None:  # on every process: one that starts late sees no change any more
        callbacks.append(TakeNewRecipe())
    trainer = build_trainer(config, callbacks, logger=build_all(config, "logger"), **trainer_changes)
    if trainer.is_global_zero:
        _open_folder(config, start)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        trainer.fit(module, datamodule=data, ckpt_path=start.checkpoint, weights_only=True)
    except Stopped as stopped:
        log.warning("stopped by %s after step %s; `resume=last` goes on there", stopped, trainer.global_step)
        sys.exit(128 + stopped.number)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return trainer


def _open_folder(config: Config, start: Start) -> None:
    """Move an earlier run of this name away, or note what a resume changes; save the configuration."""
    folder = Path(config["run_dir"])
    if start.checkpoint is None:
        move_earlier_results(folder)
    else:
        keep_curves(folder)
    if start.changes and start.checkpoint is not None:
        path = folder / "history.json"
        history = json.loads(path.read_text()) if path.is_file() else []
        changed = {change.name: [change.old, change.new] for change in start.changes}
        epoch = load_checkpoint(start.checkpoint)["epoch"]
        history.append({"epoch": epoch, "resumed_from": str(start.checkpoint), "changed": changed})
        write_whole(path, json.dumps(history, indent=2) + "\n")
    write_config(folder, config)
