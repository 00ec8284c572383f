"""Train a few-shot segmenter on base classes, then test it on novel ones.

python train.py fold=2 shot=5 finetune=svf
python train.py -m fold=0,1,2,3 finetune=frozen,svf
python train.py resume=last
"""

import logging
import sys
import time
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from svf_lightning.errors import one_line_errors

log = logging.getLogger("svf")


@one_line_errors  # for Hydra's errors
@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="train")
@one_line_errors  # for ours, before Hydra adds lines of its own
def main(cfg: DictConfig) -> float:
    """Build, fit, test, and write the run folder. Returns the test mIoU, for sweepers."""
    # Imported here, so that `python train.py --help` need not wait for them.
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint

    from svf_lightning.runs import base_stage
    from svf_lightning.runs.configuration import check_values, write_config
    from svf_lightning.runs.folder import keep_curves, move_earlier_results, resume_point
    from svf_lightning.runs.results import write_results
    from svf_lightning.runs.run import (
        build,
        build_callbacks,
        build_loggers,
        build_strategy,
        silence_warnings,
        trainer_arguments,
    )
    from svf_lightning.training.callbacks import EpisodePictures, EpisodeProgress, Finetune, RememberFeatures

    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    silence_warnings()
    check_values(config, multirun=HydraConfig.get().mode is RunMode.MULTIRUN)
    if config["task"] == "base":
        return base_stage.train(config)
    base_stage.provide(config)  # BAM needs a base learner, which may have to be trained first
    folder = Path(config["run_dir"])
    resume = resume_point(folder, config["resume"])
    if resume is None:
        move_earlier_results(folder)
    else:
        keep_curves(folder)
    write_config(folder, config)

    pl.seed_everything(config["seed"], workers=True, verbose=False)
    segmenter, data = build(config)
    chooses = config["selection"] != "last"
    checkpoints = ModelCheckpoint(
        folder / "checkpoints",
        filename="best",
        monitor="val/miou" if chooses else None,
        mode="max",
        save_top_k=int(chooses),
        save_last=True,
        enable_version_counter=False,
    )
    pictures = EpisodePictures()
    trainer = pl.Trainer(
        **trainer_arguments(config),
        logger=build_loggers(config),
        callbacks=[
            Finetune(build_strategy(config)),
            *build_callbacks(config),
            checkpoints,
            pictures,
            RememberFeatures(),
            EpisodeProgress(),
        ],
    )

    started = time.monotonic()
    trainer.fit(segmenter, datamodule=data, ckpt_path=resume, weights_only=True)
    trained = time.monotonic()
    if trainer.interrupted:
        log.warning("stopped; `resume=last` goes on from the last whole epoch")
        sys.exit(130)
    if not config["test"]:
        return float("nan")
    chosen = checkpoints.best_model_path if chooses else None
    trainer.test(segmenter, datamodule=data, ckpt_path=chosen or None, weights_only=True, verbose=False)
    seconds = {"train": trained - started, "test": time.monotonic() - trained}
    if trainer.is_global_zero:
        write_results(folder, config, segmenter, data, pictures.kept, seconds)
    return float(trainer.callback_metrics["test/miou"])


if __name__ == "__main__":
    main()
