"""Build a run from its configuration, and rebuild it from its folder.

    runs/<name>/config.yaml             every value, resolved
    runs/<name>/checkpoints/            last.ckpt, and best.ckpt where validation chooses
    runs/<name>/metrics.json            what came out, and all that is needed to repeat it
    runs/<name>/episodes.png            support, query, truth and prediction of some test episodes
    runs/<name>/csv/, tensorboard/      curves
    runs/<name>/spectra.npz             singular values by epoch, where there are any

The configuration is a plain nested dict whose ``_target_`` entries name classes and functions.
"""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from svf_lightning.data.datamodule import FewShotDataModule
from svf_lightning.data.folds import class_roles
from svf_lightning.data.source import Source
from svf_lightning.runs.configuration import Config, build_object, load_config
from svf_lightning.runs.folder import load_checkpoint, tested_checkpoint
from svf_lightning.training.segmenter import FewShotSegmenter, check_identity

log = logging.getLogger("svf")


def identity(config: Mapping[str, Any]) -> dict[str, str | int]:
    """What a run's checkpoint and results say of themselves: names of its parts, fold and shot."""
    return {**config["names"], "fold": config["fold"], "shot": config["shot"]}


def build(config: Config) -> tuple[FewShotSegmenter, FewShotDataModule]:
    """Build the LightningModule and the LightningDataModule of a run; no file of the data set is read yet."""
    roles = class_roles(*data_source(config).classes(config["fold"]), config["selection"])
    segmenter = build_segmenter(config, roles.test, roles.validation)
    return segmenter, build_data(config, segmenter.model.backbone)


def data_source(config: Config) -> Source:
    """Build the data set's description."""
    return build_object(config["data"]["source"])


def build_backbone(config: Config) -> Any:
    """Build the backbone of a run, with its pretrained weights."""
    return build_object(config["backbone"])


def build_segmenter(
    config: Config, classes: tuple[int, ...], validation_classes: tuple[int, ...] | None = None
) -> FewShotSegmenter:
    """Build backbone, method and LightningModule; the fine-tune strategy is not applied yet.

    Args:
        config: A whole run's configuration.
        classes: The classes under test, as ids of the data set.
        validation_classes: Those under validation; None is those under test.
    """
    network = build_object(config["model"]["network"])(build_backbone(config))
    recipe = {key: value for key, value in config["model"].items() if key != "network"}
    segmenter = build_object({**recipe, "_partial_": True})
    return segmenter(network, classes, validation_classes=validation_classes, identity=identity(config))


def build_data(config: Config, backbone: nn.Module) -> FewShotDataModule:
    """Build the FewShotDataModule of a run, normalising images as its backbone expects."""
    return build_object({**config["data"], "_partial_": True})(mean=backbone.mean, std=backbone.std)


def build_strategy(config: Config) -> Any:
    """Build the fine-tune strategy of a run: a function that prepares a backbone in place."""
    return build_object(config["finetune"])


def load_run(
    folder: str | Path, classes: tuple[int, ...] | None = None, root: str | None = None
) -> tuple[Config, FewShotSegmenter]:
    """Rebuild the segmenter of a finished run, with the weights that the run tested.

    Args:
        folder: The run's folder.
        classes: The classes to be tested; None asks the data set, which may have to be there to answer.
        root: Where the data set lies now; None is where it lay in training.

    Raises:
        FileNotFoundError: If the folder has no configuration or no checkpoint.
        ValueError: If the checkpoint belongs to another method, backbone or fold.
    """
    folder = Path(folder)
    config = load_config(folder)
    checkpoint_path = tested_checkpoint(folder)
    config["backbone"]["weights"] = None  # the checkpoint has them
    config["model"]["network"].pop("base", None)  # and those of BAM's base learner
    if root is not None:
        for source in (config["data"]["source"], config["model"]["network"].get("source", {})):
            source["root"] = root
    if classes is None:
        classes = data_source(config).classes(config["fold"])[1]
    segmenter = build_segmenter(config, classes)
    build_strategy(config)(segmenter.model.backbone)
    checkpoint = load_checkpoint(checkpoint_path)
    check_identity(checkpoint.get("svf_lightning", {}), segmenter.identity)
    segmenter.load_state_dict(checkpoint["state_dict"])
    return config, segmenter.eval()


def silence_warnings() -> None:
    """Leave out warnings of Lightning that a user can do nothing about."""
    for message in (
        r".*isinstance\(treespec, LeafSpec\)",  # its own use of torch
        r"Found \d+ module\(s\) in eval mode",  # BatchNorm is meant to be
        r"The number of training batches \(\d+\) is smaller than the logging interval",
        r"The '\w+_dataloader' does not have many workers",  # `workers` is the user's choice
    ):
        warnings.filterwarnings("ignore", message)


def trainer_arguments(config: Config) -> dict[str, Any]:
    """Arguments of Lightning's Trainer; the folder is ours, so it makes none of its own."""
    arguments = {key: value for key, value in config["trainer"].items() if key != "_target_"}
    if isinstance(arguments.get("strategy"), dict):
        arguments["strategy"] = build_object(arguments["strategy"])
    return {**arguments, "default_root_dir": config["run_dir"], "enable_progress_bar": True}


def build_callbacks(config: Config) -> list[Any]:
    """Build the callbacks that a run's configuration asks for; train.py adds those that every run has."""
    return [build_object(node) for node in (config.get("callbacks") or {}).values()]


def build_loggers(config: Config) -> list[Any]:
    """Build the curve loggers of a run."""
    return [build_object(node) for node in (config.get("logger") or {}).values()]
