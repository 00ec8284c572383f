"""Validation curves of runs, read from their csv logs: the paper's figure 1."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

Curve = tuple[np.ndarray, np.ndarray]  # finished epochs (E,) and mIoU in [0, 1] (E,)


def read(path: Path) -> Curve:
    """Read the validation mIoU of one run from its ``csv/metrics.csv``.

    Returns:
        Two empty arrays if nothing was validated.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; train with logger=default, which writes it")
    with path.open(newline="") as file:
        rows = [
            (int(r["epoch"]) + 1, float(r["val/miou"])) for r in csv.DictReader(file) if r.get("val/miou")
        ]
    table = np.array(rows, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def mean(curves: list[Curve]) -> Curve:
    """The mean over runs at the epochs that all of them validated.

    Example:
        >>> a = np.array([1.0, 2.0]), np.array([0.25, 0.5])
        >>> b = np.array([2.0, 4.0]), np.array([0.25, 0.75])
        >>> mean([a, b])
        (array([2.]), array([0.375]))
    """
    epochs = sorted(set.intersection(*(set(x.tolist()) for x, _ in curves)))
    heights = [dict(zip(x.tolist(), y.tolist(), strict=True)) for x, y in curves]
    return np.array(epochs), np.array([np.mean([h[epoch] for h in heights]) for epoch in epochs])


def by_strategy(folder: Path, results: list[dict[str, Any]]) -> dict[str, dict[str, Curve]]:
    """Mean curve per strategy, over folds and seeds, one set per data set, method, backbone and shots.

    Only folds and seeds that every strategy of a set has enter, or the means would not compare.

    Args:
        folder: The folder that holds the runs, or a run's own.
        results: Of :func:`svf_lightning.analysis.tables.read_results` for it.
    """
    runs: dict[str, dict[str, dict[tuple[int, int], Curve]]] = {}
    for result in results:
        run = result["identity"]
        setting = f"{run['data']}, {run['model']}, {run['backbone']}, {run['shot']} shot"
        path = folder if (folder / "metrics.json").is_file() else folder / result["run"]
        if (path / "csv" / "metrics.csv").is_file():
            curve = read(path / "csv" / "metrics.csv")
            if len(curve[0]):
                cells = runs.setdefault(setting, {}).setdefault(run["finetune"], {})
                cells[run["fold"], result["seed"]] = curve
    curves: dict[str, dict[str, Curve]] = {}
    for setting, strategies in runs.items():
        common = set.intersection(*(set(cells) for cells in strategies.values()))
        if common:
            curves[setting] = {
                name: mean([cells[key] for key in sorted(common)]) for name, cells in strategies.items()
            }
    return curves
