"""How singular values changed in training, for the paper's figures 2 to 6.

``spectra.npz``, which the callback ``SpectraLog`` writes into a run's folder, has ``epochs (E,)``, how many
were finished, beginning with 0, and per factored layer its values ``(E, R)``.

Source:
    Sun et al., NeurIPS 2022, arXiv:2206.06122, figures 2 to 6: the change of the 30 largest values of the
    convolutions of layers 2 and 3, and of all. The largest change was in the deepest 3x3 convolutions, and
    behind the first 30 values there was next to none.
"""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Spectra:
    """The singular values of a run over its epochs.

    Attributes:
        epochs: Finished epochs at each entry, shape ``(E,)``; the first is 0, the pretrained network.
        values: Per layer its values, shape ``(E, R)``, in the order of the pretrained ones.
    """

    epochs: np.ndarray
    values: dict[str, np.ndarray]


@dataclass(frozen=True)
class Place:
    """Where a layer stands: ``layer3.5.conv2`` is ``conv2`` of block ``5`` of stage ``layer3``."""

    stage: str
    block: str
    layer: str


def read(folder: Path) -> Spectra:
    """Read the spectra of a run.

    Raises:
        FileNotFoundError: If the run wrote none.
        ValueError: If the file is broken, or does not begin with the pretrained network.
    """
    path = folder / "spectra.npz"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no spectra.npz; train a strategy with singular values, such as finetune=svf, and "
            "leave callbacks.spectra in the configuration"
        )
    try:
        with np.load(path) as file:
            spectra = Spectra(file["epochs"], {name: file[name] for name in file.files if name != "epochs"})
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as spectra ({error}); is it truncated?") from None
    if spectra.epochs[0] != 0:
        raise ValueError(f"{path} begins at epoch {spectra.epochs[0]}, without the pretrained values")
    return spectra


def change(spectra: Spectra, largest: int | None = None) -> dict[str, np.ndarray]:
    """How much each value differs at the end from the pretrained one, by layer, shape ``(R,)``.

    Args:
        spectra: With two entries or more.
        largest: Only that many of a layer's values, those that were the largest when training began.

    Example:
        >>> run = Spectra(np.array([0, 1]), {"layer4": np.array([[3.0, 1.0, 2.0], [3.5, 1.0, 1.5]])})
        >>> change(run, largest=2)["layer4"].tolist()
        [0.5, -0.5]
    """
    changes = {}
    for name, values in spectra.values.items():
        # A grouped convolution has its values sorted within each group only.
        order = np.argsort(-values[0], kind="stable")[:largest]
        changes[name] = (values[-1] - values[0])[order]
    return changes


def relative_change(spectra: Spectra) -> dict[str, float]:
    """By layer the norm of the change over that of the pretrained values; 0 for a layer of zeros."""
    sizes = {name: float(np.linalg.norm(values[0])) for name, values in spectra.values.items()}
    return {
        name: float(np.linalg.norm(values)) / sizes[name] if sizes[name] else 0.0
        for name, values in change(spectra).items()
    }


def place(name: str) -> Place:
    """Split a layer's name; the numbers behind the stage are the block.

    Example:
        >>> place("layer2.0.downsample.0")
        Place(stage='layer2', block='0', layer='downsample.0')
        >>> place("layer3.1.2.conv_pw")
        Place(stage='layer3', block='1.2', layer='conv_pw')
        >>> place("layer4.7")
        Place(stage='layer4', block='7', layer='')
    """
    stage, _, rest = name.partition(".")
    numbers = re.match(r"(?:\d+(?:\.|$))*", rest)
    block = numbers.group() if numbers else ""
    return Place(stage, block.rstrip("."), rest[len(block) :])


def by_stage(changes: Mapping[str, np.ndarray]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Sort layers into stages, then kinds of layer, then blocks, each in the network's order.

    Kinds are the rows and blocks the columns of a stage's figure.
    """
    stages: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for name, values in changes.items():
        where = place(name)
        stages.setdefault(where.stage, {}).setdefault(where.layer, {})[where.block] = values
    return stages
