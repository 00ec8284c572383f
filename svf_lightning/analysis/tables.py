"""Print tables of scores: of one run, of an evaluation, and of many runs by strategy and fold."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from svf_lightning import schema
from svf_lightning.analysis.published import FROZEN, SETTING, SVF, TABLES
from svf_lightning.data.protocol import describe

log = logging.getLogger("svf")


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


def print_evaluation(result: Mapping[str, Any]) -> None:
    """Print a row per seed of test episodes, IoU of each novel class, mIoU and FB-IoU; then mean and speed.

    Args:
        result: The content of an evaluation.json.
    """
    rows, protocol = result["seeds"], result["protocol"]
    table = Table()
    for head in ("seed", *rows[0]["class_iou"], "mIoU", "FB-IoU"):
        table.add_column(head, justify="right")
    for row in rows:
        ious = [*row["class_iou"].values(), row["miou"], row["fb_iou"]]
        table.add_row(str(row["seed"]), *(f"{100 * iou:.2f}" for iou in ious))
    console = Console()
    console.print(f"fold {protocol['fold']}: {describe(protocol)}", highlight=False)
    console.print(table)
    deviation = f" ± {100 * result['miou_std']:.2f} over {len(rows)} seeds" if len(rows) > 1 else ""
    speed = len(rows) * protocol["episodes"] / max(sum(row["seconds"] for row in rows), 1e-9)
    console.print(f"mIoU {100 * result['miou_mean']:.2f}{deviation}; {speed:.1f} episodes/s", highlight=False)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read the metrics.json of every run below ``folder`` (not those moved to ``earlier/``).

    Scores of fewer episodes than the protocol's are left out, with a line that names the run.

    Raises:
        FileNotFoundError: If there is no such folder, or no finished run in it.
        ValueError: If a metrics.json is broken, of a later version, or something else.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; name the one that train.py writes its runs to")
    results = []
    for path in sorted([*folder.glob("metrics.json"), *folder.glob("*/metrics.json")]):
        result = {**schema.read(path, "metrics"), "run": path.parent.name}
        if result.get("partial"):
            tested = f"{result['scored']} of {result['protocol']['episodes']}"
            log.warning("%s is left out: only %s test episodes were scored", path, tested)
        else:
            results.append(result)
    if not results:
        raise FileNotFoundError(f"no metrics.json below {folder}; a run writes it after its test")
    return results


Cells = dict[int, list[float]]  # fold -> mIoU of every seed
Setting = tuple[str, str]  # what the runs of one table share: their parts, and their protocol


def report(results: list[dict[str, Any]]) -> list[tuple[str, Table]]:
    """Lay out methods and strategies x folds, one table per data set, backbone, number of shots and protocol.

    Where several seeds of a cell were run, the cell is their mean; a missing fold leaves its cell and
    the row's mean empty, since a mean over fewer folds would not compare.
    """
    trained = {
        (run["model"], run["finetune"], run["backbone"]): f"{result['trainable']['backbone']:,}"
        for result in results
        for run in [result["identity"]]
        if "trainable" in result
    }
    tables = []
    for (setting, protocol), rows in _by_setting(
        results, ("data", "backbone"), ("model", "finetune")
    ).items():
        backbone = setting.split(", ")[1]
        folds = sorted({fold for cells in rows.values() for fold in cells})
        table = Table()
        for head in ("method", "fine-tuning"):
            table.add_column(head, overflow="fold")  # a name cut short could not be typed
        for head in ("trained in the backbone", *(f"fold {fold}" for fold in folds), "mean"):
            table.add_column(head, justify="right")
        for (method, strategy), cells in sorted(rows.items()):
            count = trained.get((method, strategy, backbone), "")
            table.add_row(method, strategy, count, *_percent(cells, folds))
        tables.append((f"{setting}: novel-class mIoU %\n{protocol}".rstrip(), table))
    return tables


def published(results: list[dict[str, Any]], name: str) -> list[tuple[str, Table]]:
    """Lay out one of the SVF paper's tables, every run's numbers above the paper's.

    One table per data set, method, backbone, number of shots and protocol that has a run of one of its rows.
    What the frozen backbone and SVF score is added where the table itself does not say.

    Args:
        results: From :func:`read_results`.
        name: "table05" to "table13".

    Raises:
        ValueError: If there is no such table, or no run belongs to it.
    """
    if name not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}; got {name!r}")
    title, columns, rows = TABLES[name]
    rows += tuple(row for row in (FROZEN, SVF) if row.finetune not in {r.finetune for r in rows})
    tables = []
    by_setting = _by_setting(results, ("data", "model", "backbone"), ("finetune",))
    for (setting, protocol), by_row in by_setting.items():
        cells = {finetune: found for (finetune,), found in by_row.items()}
        if not {row.finetune for row in TABLES[name].rows} & set(cells):
            continue
        table = Table()
        for head in ("finetune", *columns, ""):
            table.add_column(head, overflow="fold")  # a name cut short could not be typed
        for head in (*(f"fold {fold}" for fold in range(4)), "mean"):
            table.add_column(head, justify="right")
        for row in rows:
            if row is FROZEN or row is SVF:
                table.add_section()
            labels = row.labels or ("",) * len(columns)
            ours = _percent(cells.get(row.finetune, {}), range(4))
            theirs = [
                *(f"{v:.2f}" for v in row.folds or ()),
                *[""] * (0 if row.folds else 4),
                f"{row.mean:.2f}",
            ]
            table.add_row(row.finetune, *labels, "run", *ours)
            table.add_row("", *[""] * len(columns), "paper", *theirs, style="dim")
        title_line = f"{name}, {title}. Runs: {setting}; paper: {SETTING}. Novel-class mIoU %"
        tables.append((f"{title_line}\n{protocol}".rstrip(), table))
    if not tables:
        raise ValueError(
            f"no run of {name}'s strategies is finished; `python train.py sweep={name}` makes them"
        )
    return tables


def _by_setting(
    results: list[dict[str, Any]], shared: Sequence[str], row: Sequence[str]
) -> dict[Setting, dict[tuple[str, ...], Cells]]:
    """Sort results by setting, then by row, then by fold.

    Args:
        results: From :func:`read_results`.
        shared: Parts of a run's identity that one table's runs share, besides shots and protocol. Runs of
            before protocols were saved have an empty one.
        row: Parts that make a row.
    """
    groups: dict[Setting, dict[tuple[str, ...], Cells]] = {}
    for result in results:
        run = result["identity"]
        setting = ", ".join([*(run[part] for part in shared), f"{run['shot']} shot"])
        protocol = describe(result["protocol"]) if "protocol" in result else ""
        rows = groups.setdefault((setting, protocol), {})
        cells = rows.setdefault(tuple(run[part] for part in row), {})
        cells.setdefault(run["fold"], []).append(result["miou"])
    return dict(sorted(groups.items()))


def _percent(cells: Cells, folds: Sequence[int]) -> list[str]:
    """The mean over seeds for every fold, then the mean over folds if none is missing."""
    means = [sum(cells[f]) / len(cells[f]) if f in cells else None for f in folds]
    known = [m for m in means if m is not None]
    mean = f"{100 * sum(known) / len(known):.2f}" if len(known) == len(folds) else ""
    return [*("" if m is None else f"{100 * m:.2f}" for m in means), mean]
