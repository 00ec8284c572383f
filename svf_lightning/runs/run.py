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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, Trainer

from svf_lightning.data.datamodule import FewShotDataModule
from svf_lightning.objects import build_object, check_trust
from svf_lightning.runs.configuration import Config, load_config
from svf_lightning.runs.folder import tested_checkpoint
from svf_lightning.training.checkpoints import load_checkpoint, load_weights
from svf_lightning.training.optimizers import check_identity
from svf_lightning.training.segmenter import FewShotSegmenter

log = logging.getLogger("svf")


def identity(config: Mapping[str, Any]) -> dict[str, str | int]:
    """What a run's checkpoint and results say of themselves: names of its parts, fold and shot."""
    return {**config["names"], "fold": config["fold"], "shot": config["shot"]}


def build(config: Config) -> tuple[FewShotSegmenter, FewShotDataModule]:
    """Build the LightningModule and the LightningDataModule of a run; no file of the data set is read yet."""
    data = build_data(config)
    return build_segmenter(config, data.roles.test, data.roles.validation), data


def build_part(config: Config, name: str) -> Any:
    """Build "data", "backbone", "model" or "finetune" of a run, or what stands below, as "data.source"."""
    node: Any = config
    for key in name.split("."):
        node = node[key]
    group = name.split(".")[0]
    choice = config.get("names", {}).get(group)
    return build_object(node, f"{name} (conf/{group}/{choice}.yaml)" if choice else name)


def build_segmenter(
    config: Config, classes: tuple[int, ...], validation_classes: tuple[int, ...] | None = None
) -> FewShotSegmenter:
    """Build backbone, method and LightningModule; the fine-tune strategy is not applied yet.

    Args:
        config: A whole run's configuration.
        classes: The classes under test, as ids of the data set.
        validation_classes: Those under validation; None is those under test.
    """
    segmenter: FewShotSegmenter = build_part(config, "model")
    segmenter.set_classes(classes, validation_classes)
    segmenter.identity = identity(config)
    segmenter.configuration = {
        "model": without_weights(config["model"]),
        "finetune": config["finetune"],
    }
    return segmenter


def build_data(config: Config) -> FewShotDataModule:
    """Build the data module of a run; it normalises images as the backbone under its Trainer expects."""
    return build_part(config, "data")


def build_trainer(config: Config, callbacks: Sequence[Callback], **changes: Any) -> Trainer:
    """Build the Trainer of a run with other callbacks, or with other values of its own."""
    node = {**config["trainer"], "enable_progress_bar": True, "_partial_": True}
    logger = changes.pop("logger", False)
    return build_object({**node, **changes}, "trainer")(callbacks=list(callbacks), logger=logger)


def build_all(config: Config, group: str) -> list[Any]:
    """Build every entry of "callbacks" or "logger"."""
    nodes = (config.get(group) or {}).items()
    return [build_object(node, f"{group}.{name}") for name, node in nodes if node is not None]


def without_weights(model: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a model whose weights a checkpoint will bring."""
    network = {key: value for key, value in model["network"].items() if key != "base"}  # BAM's base learner
    return {**model, "network": {**network, "backbone": {**network["backbone"], "weights": None}}}


def load_run(
    folder: str | Path,
    classes: tuple[int, ...] | None = None,
    root: str | None = None,
    trust: str | Sequence[str] = (),
) -> tuple[Config, FewShotSegmenter]:
    """Rebuild the segmenter of a finished run, with the weights that the run tested.

    Args:
        folder: The run's folder.
        classes: The classes to be tested; None asks the data set, which may have to be there to answer.
        root: Where the data set lies now; None is where it lay in training.
        trust: Modules that the run's configuration may call, beside those of this package.

    Raises:
        FileNotFoundError: If the folder has no configuration or no checkpoint.
        ValueError: If the checkpoint belongs to another method, backbone or fold, or the configuration wants
            to call code that is not trusted.
    """
    folder = Path(folder)
    config = load_config(folder)
    checkpoint_path = tested_checkpoint(folder)
    check_run(config, f"{folder}/config.yaml", trust)
    config["model"] = without_weights(config["model"])
    config["backbone"] = config["model"]["network"]["backbone"]
    if root is not None:
        for source in (config["data"]["source"], config["model"]["network"].get("source", {})):
            source["root"] = root
    if classes is None:
        classes = build_part(config, "data.source").classes(config["fold"])[1]
    segmenter = build_segmenter(config, classes)
    build_part(config, "finetune")(segmenter.model.backbone)
    checkpoint = load_checkpoint(checkpoint_path)
    check_identity(checkpoint.get("svf_lightning", {}), segmenter.identity)
    load_weights(segmenter, checkpoint["state_dict"], checkpoint_path)
    return config, segmenter.eval()


def check_run(config: Config, source: str, trust: str | Sequence[str] = ()) -> None:
    """Refuse a run's configuration that wants to call more than parts of a run and what ``trust`` names.

    Loggers and callbacks may be anything: they belong to training, which no file decides.

    Raises:
        ValueError: Naming the code.
    """
    used = ("data", "backbone", "model", "finetune", "trainer")
    check_trust({name: config[name] for name in used if name in config}, source, trust)


def silence_warnings() -> None:
    """Leave out warnings of Lightning that a user can do nothing about."""
    for message in (
        r".*isinstance\(treespec, LeafSpec\)",  # its own use of torch
        r"Found \d+ module\(s\) in eval mode",  # BatchNorm is meant to be
        r"The number of training batches \(\d+\) is smaller than the logging interval",
        r"The '\w+_dataloader' does not have many workers",  # `workers` is the user's choice
    ):
        warnings.filterwarnings("ignore", message)
