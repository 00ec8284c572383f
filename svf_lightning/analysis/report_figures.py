"""Draw the figures of `svf report --figures` into the folders of the runs."""

from pathlib import Path
from typing import Any

from svf_lightning.analysis import curves, figures, spectra

LARGEST = 30  # values a layer, as in the paper's figures


def draw(folder: Path, results: list[dict[str, Any]]) -> list[Path]:
    """Draw the spectra of every run that logged them, and the curves of all strategies together.

    Args:
        folder: A run's folder, or one that holds runs.
        results: Of :func:`svf_lightning.analysis.tables.read_results` for it.

    Returns:
        The PNG files: ``figures/`` in each run's folder, and ``figures/curves_*.png`` in ``folder``.

    Raises:
        FileNotFoundError: If there was nothing to draw.
        ValueError: If a file of a run is broken.
    """
    single = (folder / "metrics.json").is_file()
    paths = []
    for result in results:
        run = folder if single else folder / result["run"]
        if (run / "spectra.npz").is_file():
            paths += of_run(run)
    for setting, by_strategy in curves.by_strategy(folder, results).items():
        path = folder / "figures" / f"curves_{setting.replace(', ', '-').replace(' ', '')}.png"
        figures.learning_curves(by_strategy, setting, path)
        paths.append(path)
    if not paths:
        raise FileNotFoundError(
            f"no run in {folder} has spectra.npz or validation scores in csv/metrics.csv to draw; "
            "train with finetune=svf"
        )
    return paths


def of_run(run: Path) -> list[Path]:
    """Draw the spectra of one run: the 30 largest values, all values, and the change of every layer."""
    content = spectra.read(run)
    target = run / "figures"
    paths = []
    for name, largest, title in (
        ("largest", LARGEST, f"change of the {LARGEST} largest singular values"),
        ("all", None, "change of all singular values"),
    ):
        stages = spectra.by_stage(spectra.change(content, largest))
        paths += figures.spectra(stages, target, f"spectra_{name}", title)
    paths.append(target / "spectra_layers.png")
    figures.relative_changes(spectra.relative_change(content), paths[-1])
    return paths
