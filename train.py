"""Train a few-shot segmenter on base classes, then test it on novel ones.

python train.py fold=2 shot=5 finetune=svf
python train.py -m fold=0,1,2,3 finetune=frozen,svf
python train.py -m fold=0,1,2,3 finetune=frozen,svf skip_done=true
python train.py resume=last
"""

import time
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from svf_lightning.errors import one_line_errors
from svf_lightning.runs.sweeps import recorded


@one_line_errors  # for Hydra's errors
@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="train")
@one_line_errors  # for ours, before Hydra adds lines of its own
@recorded
def main(cfg: DictConfig) -> float:
    """Build, fit, test, and write the results. Returns the test mIoU, for sweepers."""
    # Imported here, so that `python train.py --help` need not wait for them.
    from svf_lightning.runs import base_stage
    from svf_lightning.runs.configuration import check_choices, check_values
    from svf_lightning.runs.fit import begin, fit
    from svf_lightning.runs.results import write_results
    from svf_lightning.runs.run import build, silence_warnings
    from svf_lightning.runs.weights import init_from

    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    silence_warnings()
    check_values(config, multirun=HydraConfig.get().mode is RunMode.MULTIRUN)
    check_choices(config)
    if config["task"] == "base":
        return base_stage.train(config)
    base_stage.provide(config)  # BAM needs a base learner, which may have to be trained first
    start = begin(config)
    segmenter, data = build(config)
    if config["init_from"] and start.checkpoint is None:
        init_from(segmenter, config["init_from"], config["trust"])

    started = time.monotonic()
    trainer = fit(config, segmenter, data, start)
    trained = time.monotonic()
    if not config["test"]:
        return float("nan")
    chosen = (
        getattr(trainer.checkpoint_callback, "best_model_path", "") if config["selection"] != "last" else ""
    )
    trainer.test(segmenter, datamodule=data, ckpt_path=chosen or None, weights_only=True, verbose=False)
    seconds = {"train": trained - started, "test": time.monotonic() - trained}
    if trainer.is_global_zero:
        write_results(config, segmenter, data, seconds)
    return float(trainer.callback_metrics["test/miou"])


if __name__ == "__main__":
    main()
