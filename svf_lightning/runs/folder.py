"""Find and move the files in a run's folder: checkpoints, and results of earlier runs."""

import logging
from pathlib import Path

from svf_lightning.training.checkpoints import load_checkpoint

log = logging.getLogger("svf")


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


def tested_checkpoint(folder: Path) -> Path:
    """The checkpoint that a run tested: best.ckpt where validation chose one, else last.ckpt."""
    for name in ("best.ckpt", "last.ckpt"):
        if (folder / "checkpoints" / name).is_file():
            return folder / "checkpoints" / name
    raise FileNotFoundError(f"{folder}/checkpoints has neither best.ckpt nor last.ckpt; train the run first")


def keep_earlier(path: Path) -> None:
    """Give a result a number before another one takes its name."""
    if path.exists():
        earlier = len(list(path.parent.glob(f"{path.stem}-*{path.suffix}")))
        path.rename(path.with_name(f"{path.stem}-{earlier + 1}{path.suffix}"))
