"""Tables for people who compare: one run's scores, and folds by strategies over many runs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_scores(result: Mapping[str, Any], title: str) -> None:
    """Print IoU per novel class, mIoU and FB-IoU, in percent.

    Args:
        result: With ``class_iou`` (name to IoU), ``miou`` and ``fb_iou``, all in [0, 1].
        title: Stands above the table.
    """
    table = Table()
    table.add_column("novel class")
    table.add_column("IoU %", justify="right")
    for name, iou in result["class_iou"].items():
        table.add_row(name, f"{100 * iou:.2f}")
    table.add_section()
    table.add_row("mIoU", f"[bold]{100 * result['miou']:.2f}")
    table.add_row("FB-IoU", f"{100 * result['fb_iou']:.2f}")
    console = Console()
    console.print(title, highlight=False)
    console.print(table)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read the metrics.json of every run below ``folder`` (not those moved to ``earlier/``).

    Raises:
        FileNotFoundError: If there is no such folder, or no finished run in it.
        ValueError: If a metrics.json cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; name the one that train.py writes its runs to")
    results = []
    for path in sorted([*folder.glob("metrics.json"), *folder.glob("*/metrics.json")]):
        try:
            result = json.loads(path.read_text())
            result["config"]["finetune"]["_target_"], result["miou"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a whole metrics.json ({error}); delete it or run that job again"
            ) from None
        results.append({**result, "run": path.parent.name})
    if not results:
        raise FileNotFoundError(f"no metrics.json below {folder}; a run writes it after its test")
    return results


def report(results: list[dict[str, Any]]) -> list[tuple[str, Table]]:
    """Lay out folds x strategies, one table per data set, method, backbone and number of shots.

    Where several seeds of a cell were run, the cell is their mean; a missing fold leaves its cell and
    the row's mean empty, since a mean over fewer folds would not compare.
    """
    groups: dict[tuple[str, ...], dict[str, dict[int, list[float]]]] = {}
    for result in results:
        identity = result["identity"]
        key: tuple[str, ...] = (identity["data"], identity["model"], identity["backbone"], f"{identity['shot']} shot")
        cells = groups.setdefault(key, {}).setdefault(identity["finetune"], {})
        cells.setdefault(identity["fold"], []).append(result["miou"])
    tables = []
    for title, rows in sorted(groups.items()):
        folds = sorted({fold for cells in rows.values() for fold in cells})
        table = Table()
        table.add_column("fine-tuning")
        for fold in folds:
            table.add_column(f"fold {fold}", justify="right")
        table.add_column("mean", justify="right")
        for strategy, cells in sorted(rows.items()):
            means = [sum(cells[f]) / len(cells[f]) if f in cells else None for f in folds]
            known = [m for m in means if m is not None]
            mean = f"{100 * sum(known) / len(known):.2f}" if len(known) == len(folds) else ""
            table.add_row(strategy, *("" if m is None else f"{100 * m:.2f}" for m in means), mean)
        tables.append((", ".join(title) + ": novel-class mIoU %", table))
    return tables
