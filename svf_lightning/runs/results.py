"""The results of a run: its scores, what they depend on, and the files they are written to."""

import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svf_lightning.data.datamodule import FewShotDataModule
from svf_lightning.data.protocol import describe
from svf_lightning.files import write_whole
from svf_lightning.runs.configuration import Config
from svf_lightning.runs.run import identity
from svf_lightning.schema import checked
from svf_lightning.training.callbacks import count_trainable
from svf_lightning.training.segmenter import FewShotSegmenter

log = logging.getLogger("svf")


def environment() -> dict[str, Any]:
    """Everything outside the configuration that a result depends on: code, versions, machine."""

    def git(*arguments: str) -> str | None:
        """What git says; None where there is no git, or no repository."""
        root = Path(__file__).parent
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no")
    packages = ("svf-lightning", "torch", "torchvision", "pytorch-lightning", "timm", "numpy", "pillow")
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    return {
        "command": " ".join(sys.argv),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}},
        "machine": {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }


def test_scores(metrics: Mapping[str, Tensor], data: FewShotDataModule) -> dict[str, Any]:
    """The test scores as plain numbers: mIoU, FB-IoU and the IoU of each novel class by name.

    And ``scored``, how many episodes went into them; ``partial`` where these are fewer than the protocol's,
    as with ``limit_test_batches``, so that no table takes such scores for the test.
    """
    names = data.source.class_names
    scored = int(metrics["test/episodes"])
    return {
        "scored": scored,
        **({"partial": True} if scored < len(data.test_set) else {}),
        "miou": float(metrics["test/miou"]),
        "fb_iou": float(metrics["test/fb_iou"]),
        "class_iou": {names[c - 1]: float(metrics[f"test/class_{c}"]) for c in data.roles.test},
    }


def write_results(
    config: Config, segmenter: FewShotSegmenter, data: FewShotDataModule, seconds: Mapping[str, float]
) -> None:
    """Write metrics.json and, if the run keeps episodes, episodes.png; print the table of scores."""
    from svf_lightning.analysis import figures, tables

    if segmenter.trainer.fast_dev_run:  # type: ignore[attr-defined]
        log.warning("fast_dev_run only tries whether all runs: no result is written")
        return
    folder = Path(config["run_dir"])
    history = folder / "history.json"
    result = {
        **test_scores(segmenter.trainer.callback_metrics, data),
        "protocol": data.protocol().as_dict(),
        "trainable": count_trainable(segmenter.model),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "identity": identity(config),
        **environment(),
        "seed": config["seed"],
        "config": config,
        "history": json.loads(history.read_text()) if history.is_file() else [],
    }
    path = folder / "metrics.json"
    write_whole(path, json.dumps(checked(result, "metrics", path), indent=2) + "\n")
    kept = [pair for callback in segmenter.trainer.callbacks for pair in getattr(callback, "kept", [])]  # type: ignore[attr-defined]
    if kept:
        mean, std = segmenter.model.backbone.mean, segmenter.model.backbone.std
        figures.episode_grid(kept, data.source.class_names, mean, std, folder / "episodes.png")
    if "partial" in result:
        log.warning(
            "PARTIAL: %s of %s test episodes were scored; `svf report` leaves this run out",
            *(result["scored"], result["protocol"]["episodes"]),
        )
    tables.print_scores(result, f"fold {config['fold']}: {describe(result['protocol'])}")
    log.info("wrote %s%s", path, ", with pictures in episodes.png" if kept else "")
