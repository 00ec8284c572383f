"""The configuration of a run: compose it, check it, save it, and build objects from it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from svf_lightning.data.folds import SELECTIONS
from svf_lightning.files import write_whole
from svf_lightning.runs import earlier

Config = dict[str, Any]


def check_values(config: Config, multirun: bool = False) -> None:
    """Refuse values that no part of a run would name as clearly.

    Raises:
        ValueError: Naming the value and what is allowed.
    """
    if config["selection"] not in SELECTIONS:
        known = ", ".join(map(repr, SELECTIONS))
        raise ValueError(f"selection must be one of {known}, got {config['selection']!r}")
    if config.get("resume_changes", "refuse") not in ("refuse", "allow"):
        raise ValueError(f"resume_changes must be refuse or allow, got {config['resume_changes']!r}")
    if not isinstance(config["shot"], int) or config["shot"] < 1:
        raise ValueError(f"shot must be a whole number of 1 or more, got {config['shot']!r}")
    if multirun and is_distributed(config):
        raise ValueError(
            "trainer.strategy=ddp cannot run under -m: its processes would start the sweep again; "
            "run the jobs one by one, or sweep with one device each"
        )


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
    files = Path(__file__).parents[2] / "conf"
    if not files.is_dir():
        raise FileNotFoundError(
            f"no configuration files at {files}; run this in a checkout of the repository"
        )
    return files


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
    return earlier.update(yaml.safe_load(path.read_text()))


def write_config(folder: Path, config: Config) -> None:
    """Save the resolved configuration, from which :func:`load_run` rebuilds the run."""
    write_whole(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))


def is_distributed(config: Config) -> bool:
    """Whether a run trains in several processes, in whatever way its trainer says so."""
    trainer = config["trainer"]
    strategy = str(trainer.get("strategy") or "auto").lower()  # a name, or what builds a strategy object
    devices = trainer.get("devices", 1)
    several = len(devices) > 1 if isinstance(devices, list) else str(devices) not in ("1", "auto")
    return several or trainer.get("num_nodes", 1) != 1 or any(kind in strategy for kind in ("ddp", "fsdp"))
