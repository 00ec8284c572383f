"""Train BAM's base learner, the first stage of a BAM run: alone, or because a run needs one."""

import json
import logging
from pathlib import Path
from typing import Any

from svf_lightning.data.base_images import BaseDataModule
from svf_lightning.data.folds import class_roles
from svf_lightning.files import write_whole
from svf_lightning.models.pspnet import PSPNet
from svf_lightning.objects import check_arguments
from svf_lightning.runs.configuration import Config, is_distributed
from svf_lightning.runs.fit import begin, fit
from svf_lightning.runs.folder import tested_checkpoint
from svf_lightning.runs.results import environment
from svf_lightning.runs.run import build_part
from svf_lightning.schema import checked
from svf_lightning.training.base_learner import BaseSegmenter, save_base
from svf_lightning.training.checkpoints import load_checkpoint

log = logging.getLogger("svf")

_OF_DATA = ("image_size", "batch_size", "augment")
_NOT_OF_SEGMENTER = (*_OF_DATA, "run_name", "suffix", "train_batch_norm")


def provide(config: Config) -> None:
    """Replace ``model.network.base: auto`` by the base learner's file, training it first if it is missing.

    The file belongs to data set, backbone, fold and seed, and lies in a folder of that name beside the run's
    own. So runs that differ in shots or strategy share it. A training that was interrupted goes on.

    Args:
        config: A whole run's configuration; changed in place. Left alone if it asks for no base learner.

    Raises:
        ValueError: If it is missing and the run is distributed.
    """
    network = config["model"]["network"]
    if network.get("base") != "auto":
        return
    folder = Path(config["run_dir"]).parent / config["base"]["run_name"]
    if not (folder / "base.pth").is_file():
        if is_distributed(config):
            raise ValueError(
                f"no base learner in {folder}, and a distributed run cannot train it on its way; "
                "run the same command with task=base first"
            )
        log.info("no base learner in %s yet: training it first", folder)
        begun = (folder / "checkpoints" / "last.ckpt").is_file()
        train({**config, "run_dir": str(folder), "resume": "last" if begun else None})
    network["base"] = str(folder / "base.pth")


def train(config: Config) -> float:
    """Train the base learner of a BAM configuration and write ``base.pth`` into the run's folder.

    Args:
        config: A whole run's configuration; ``base`` holds the settings of this stage.

    Returns:
        The best base mIoU on the validation images, in [0, 1]. Its weights are the ones in the file.

    Raises:
        ValueError: If the configuration is not one of BAM, or a value is not possible.
    """
    if "base" not in config:
        raise ValueError(f"task=base trains BAM's base learner; model={config['names']['model']} has none")
    settings: dict[str, Any] = config["base"]
    of_segmenter = {key: value for key, value in settings.items() if key not in _NOT_OF_SEGMENTER}
    check_arguments(BaseSegmenter, of_segmenter, "base (conf/model/bam.yaml)")
    folder = Path(config["run_dir"])
    config = _of_this_stage(config, folder)
    start = begin(config)
    source = build_part(config, "data.source")
    base, novel = source.classes(config["fold"])
    classes = class_roles(base, novel, config["selection"]).train
    backbone = build_part(config, "backbone")
    model = PSPNet(backbone, len(classes), train_batch_norm=settings["train_batch_norm"])
    header = {
        "data": source.name,
        "fold": config["fold"],
        "classes": list(classes),
        "backbone": config["names"]["backbone"],
    }
    segmenter = BaseSegmenter(
        model,
        seed=config["seed"],
        identity={"task": "base", **{key: header[key] for key in ("data", "fold", "backbone")}},
        **of_segmenter,
    )
    data = BaseDataModule(
        source,
        classes=classes,
        mean=backbone.mean,
        std=backbone.std,
        seed=config["seed"],
        workers=config["workers"],
        **{key: settings[key] for key in _OF_DATA},
    )
    changes = {"max_epochs": settings["epochs"], "check_val_every_n_epoch": 1}
    trainer = fit(config, segmenter, data, start, default_root_dir=str(folder), **changes)
    best: Any = trainer.checkpoint_callback
    miou = float("nan") if best.best_model_score is None else float(best.best_model_score)
    if trainer.is_global_zero:
        chosen = load_checkpoint(tested_checkpoint(folder))
        segmenter.load_state_dict(chosen["state_dict"])
        result = {**header, "base_miou": miou, "epochs": settings["epochs"]}
        save_base(folder / "base.pth", model, result)
        validated = {**result, "base_miou": None if best.best_model_score is None else miou}
        content = checked({**validated, **environment()}, "base", folder / "base.json")
        write_whole(folder / "base.json", json.dumps(content, indent=2) + "\n")
        log.info("base mIoU %.2f %%; wrote %s", 100 * miou, folder / "base.pth")
    return miou


def _of_this_stage(config: Config, folder: Path) -> Config:
    """The configuration with callbacks and loggers of the base learner's own folder."""
    room = "svf_lightning.training.callbacks"
    checkpoint = {"folder": str(folder / "checkpoints"), "selection": "base", "monitor": "val/base_miou"}
    loggers = {
        name: {**node, "save_dir": str(folder)} if "save_dir" in node else node
        for name, node in (config.get("logger") or {}).items()
    }
    callbacks = {
        "checkpoint": {"_target_": "svf_lightning.training.saving.RunCheckpoint", **checkpoint},
        "progress": {"_target_": f"{room}.EpisodeProgress", "unit": "images"},
    }
    return {**config, "logger": loggers, "callbacks": callbacks}
