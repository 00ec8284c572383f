"""A run: built from its configuration, and rebuilt from the folder that it left behind.

    runs/<name>/config.yaml             every value, resolved
    runs/<name>/checkpoints/            last.ckpt, and best.ckpt where validation chooses
    runs/<name>/metrics.json            what came out, and all that is needed to repeat it
    runs/<name>/episodes.png            support, query, truth and prediction of some test episodes
    runs/<name>/csv/, tensorboard/      curves
    runs/<name>/spectra.npz             singular values by epoch, where there are any

The configuration is a plain nested dict whose ``_target_`` entries name classes and functions.
"""

import json
import logging
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from svf_lightning.data.datamodule import FewShotDataModule
from svf_lightning.data.folds import SELECTIONS, class_roles
from svf_lightning.data.index import Source
from svf_lightning.data.protocol import describe
from svf_lightning.episode import Episode
from svf_lightning.segmenter import FewShotSegmenter, check_identity

log = logging.getLogger("svf")

Config = dict[str, Any]


def check(config: Config, multirun: bool = False) -> None:
    """Refuse values that no part of a run would name as clearly.

    Raises:
        ValueError: Naming the value and what is allowed.
    """
    if config["selection"] not in SELECTIONS:
        known = ", ".join(map(repr, SELECTIONS))
        raise ValueError(f"selection must be one of {known}, got {config['selection']!r}")
    if not isinstance(config["shot"], int) or config["shot"] < 1:
        raise ValueError(f"shot must be a whole number of 1 or more, got {config['shot']!r}")
    if multirun and "ddp" in str(config["trainer"].get("strategy", "")).lower():
        raise ValueError(
            "trainer.strategy=ddp cannot run under -m: its processes would start the sweep again; "
            "run the jobs one by one, or sweep with one device each"
        )


def resume_point(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint file to go on from, if any.

    Args:
        folder: The run's folder.
        resume: None, "last", or a path.

    Raises:
        FileNotFoundError: If ``resume`` is a path without a file.
        ValueError: If the file is truncated.
    """
    if resume is None:
        return None
    path = folder / "checkpoints" / "last.ckpt" if resume == "last" else Path(resume)
    if resume == "last" and not path.is_file():
        log.warning("no checkpoint to resume at %s: starting afresh", path)
        return None
    load_checkpoint(path)
    return path


def move_earlier_results(folder: Path) -> None:
    """Put what an earlier run of the same name left into ``earlier/<n>/``, so that nothing is lost."""
    old = [
        p
        for name in (
            *("checkpoints", "csv", "tensorboard", "metrics.json", "episodes.png", "config.yaml"),
            *("spectra.npz", "figures"),
        )
        if (p := folder / name).exists()
    ]
    if not (folder / "checkpoints").exists():
        return
    number = 1 + sum(1 for _ in (folder / "earlier").glob("*"))
    target = folder / "earlier" / str(number)
    target.mkdir(parents=True)
    for path in old:
        path.rename(target / path.name)
    log.warning("moved the earlier run of this name to %s (resume=last would have gone on with it)", target)


def keep_curves(folder: Path) -> None:
    """Give the table of curves a number before a resumed run begins a new one; the logger would delete it."""
    keep_earlier(folder / "csv" / "metrics.csv")


def identity(config: Mapping[str, Any]) -> dict[str, str | int]:
    """What a run's checkpoint and results say of themselves: names of its parts, fold and shot."""
    return {**config["names"], "fold": config["fold"], "shot": config["shot"]}


def build(config: Config) -> tuple[FewShotSegmenter, FewShotDataModule]:
    """Build the LightningModule and the LightningDataModule of a run; no file of the data set is read yet."""
    roles = class_roles(*data_source(config).classes(config["fold"]), config["selection"])
    segmenter = build_segmenter(config, roles.test, roles.validation)
    return segmenter, build_data(config, segmenter.model.backbone)


def compose(overrides: Sequence[str], folder: Path) -> Config:
    """The configuration that ``python train.py OVERRIDES`` would have with ``folder`` as its run folder.

    Raises:
        FileNotFoundError: If the package lies without its configuration files.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf, open_dict

    with initialize_config_dir(version_base="1.3", config_dir=str(_configuration_files())):
        config = compose("train", list(overrides), return_hydra_config=True)
    OmegaConf.set_readonly(config, False)
    with open_dict(config):
        config.hydra.runtime.output_dir = str(folder)
        HydraConfig.instance().set_config(config)  # what ${hydra:...} asks
        del config.hydra
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def choices(group: str) -> list[str]:
    """What a group of the configuration has to choose from, such as all names of "finetune", sorted.

    Raises:
        FileNotFoundError: If the package lies without its configuration files.
    """
    return sorted(path.stem for path in (_configuration_files() / group).glob("*.yaml"))


def _configuration_files() -> Path:
    files = Path(__file__).parent.parent / "conf"
    if not files.is_dir():
        raise FileNotFoundError(
            f"no configuration files at {files}; run this in a checkout of the repository"
        )
    return files


def data_source(config: Config) -> Source:
    """Build the data set's description."""
    return _instantiate(config["data"]["source"])


def build_backbone(config: Config) -> Any:
    """Build the backbone of a run, with its pretrained weights."""
    return _instantiate(config["backbone"])


def build_segmenter(
    config: Config, classes: tuple[int, ...], validation_classes: tuple[int, ...] | None = None
) -> FewShotSegmenter:
    """Build backbone, method and LightningModule; the fine-tune strategy is not applied yet.

    Args:
        config: A whole run's configuration.
        classes: The classes under test, as ids of the data set.
        validation_classes: Those under validation; None is those under test.
    """
    network = _instantiate(config["model"]["network"])(build_backbone(config))
    recipe = {key: value for key, value in config["model"].items() if key != "network"}
    segmenter = _instantiate({**recipe, "_partial_": True})
    return segmenter(network, classes, validation_classes=validation_classes, identity=identity(config))


def build_data(config: Config, backbone: nn.Module) -> FewShotDataModule:
    """Build the FewShotDataModule of a run, normalising images as its backbone expects."""
    return _instantiate({**config["data"], "_partial_": True})(mean=backbone.mean, std=backbone.std)


def build_strategy(config: Config) -> Any:
    """Build the fine-tune strategy of a run: a function that prepares a backbone in place."""
    return _instantiate(config["finetune"])


def _instantiate(node: Mapping[str, Any]) -> Any:
    # Hydra builds objects from `_target_` entries; imported late, as everything heavy.
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(dict(node), _convert_="all")
    except InstantiationException as error:
        # What the user did wrong is in the cause; Hydra's wrapping repeats it in four lines.
        if isinstance(error.__cause__, (ValueError, OSError)):
            raise error.__cause__ from None
        raise


def load_config(folder: str | Path) -> Config:
    """Read the configuration of a run.

    Raises:
        FileNotFoundError: If the folder has none.
    """
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a run folder: it has no config.yaml; name one that train.py made"
        )
    return yaml.safe_load(path.read_text())


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


def tested_checkpoint(folder: Path) -> Path:
    """The checkpoint that a run tested: best.ckpt where validation chose one, else last.ckpt."""
    for name in ("best.ckpt", "last.ckpt"):
        if (folder / "checkpoints" / name).is_file():
            return folder / "checkpoints" / name
    raise FileNotFoundError(f"{folder}/checkpoints has neither best.ckpt nor last.ckpt; train the run first")


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without running any code that it may contain.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the file is truncated or not a checkpoint of tensors and plain values.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; give the path of a .ckpt file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a broken file
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as a checkpoint ({reason}); is it truncated?") from None


def count_trainable(model: nn.Module) -> dict[str, int]:
    """How many numbers train in the backbone and in the head, and how many there are in all."""
    backbone = {id(p) for p in model.get_submodule("backbone").parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return {
        "backbone": sum(p.numel() for p in trainable if id(p) in backbone),
        "head": sum(p.numel() for p in trainable if id(p) not in backbone),
        "all": sum(p.numel() for p in model.parameters()),
    }


def surroundings() -> dict[str, Any]:
    """Everything outside the configuration that a result depends on: code, versions, machine."""

    def git(*arguments: str) -> str | None:
        root = Path(__file__).parent
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    packages = ("svf-lightning", "torch", "torchvision", "pytorch-lightning", "timm", "numpy", "pillow")
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    return {
        "command": " ".join(sys.argv),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}},
        "machine": {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it, so that it is never seen half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_config(folder: Path, config: Config) -> None:
    """Save the resolved configuration, from which :func:`load_run` rebuilds the run."""
    write_whole(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))


def scores(metrics: Mapping[str, Tensor], data: FewShotDataModule) -> dict[str, Any]:
    """The test scores as plain numbers: mIoU, FB-IoU and the IoU of each novel class by name."""
    names = data.source.class_names
    return {
        "miou": float(metrics["test/miou"]),
        "fb_iou": float(metrics["test/fb_iou"]),
        "class_iou": {names[c - 1]: float(metrics[f"test/class_{c}"]) for c in data.roles.test},
    }


def write_results(
    folder: Path,
    config: Config,
    segmenter: FewShotSegmenter,
    data: FewShotDataModule,
    kept: Sequence[tuple[Episode, Tensor, Tensor]],
    seconds: Mapping[str, float],
) -> None:
    """Write metrics.json and episodes.png, and print the table of scores."""
    from svf_lightning.analysis import figures, tables

    result = {
        **scores(segmenter.trainer.callback_metrics, data),
        "protocol": data.protocol().as_dict(),
        "trainable": count_trainable(segmenter.model),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "identity": identity(config),
        **surroundings(),
        "seed": config["seed"],
        "config": config,
    }
    write_whole(folder / "metrics.json", json.dumps(result, indent=2) + "\n")
    backbone = segmenter.model.backbone
    figures.episode_grid(kept, data.source.class_names, backbone.mean, backbone.std, folder / "episodes.png")
    tables.print_scores(result, f"fold {config['fold']}: {describe(result['protocol'])}")
    log.info("wrote %s, with pictures in episodes.png", folder / "metrics.json")


def keep_earlier(path: Path) -> None:
    """Give a result a number before another one takes its name."""
    if path.exists():
        earlier = len(list(path.parent.glob(f"{path.stem}-*{path.suffix}")))
        path.rename(path.with_name(f"{path.stem}-{earlier + 1}{path.suffix}"))


def hush() -> None:
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
        arguments["strategy"] = _instantiate(arguments["strategy"])
    return {**arguments, "default_root_dir": config["run_dir"], "enable_progress_bar": True}


def build_callbacks(config: Config) -> list[Any]:
    """Build the callbacks that a run's configuration asks for; train.py adds those that every run has."""
    return [_instantiate(node) for node in (config.get("callbacks") or {}).values()]


def build_loggers(config: Config) -> list[Any]:
    """Build the curve loggers of a run."""
    return [_instantiate(node) for node in (config.get("logger") or {}).values()]
