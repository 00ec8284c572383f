"""The configuration of a run: compose it, check it, save it, and build objects from it."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from svf_lightning.data.folds import SELECTIONS
from svf_lightning.files import write_whole
from svf_lightning.runs import earlier

Config = dict[str, Any]

_WHOLE_NUMBERS = {"fold": 0, "shot": 1, "seed": 0, "epochs": 0, "workers": 0}  # and the least of each


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
    for key, least in _WHOLE_NUMBERS.items():
        value = config.get(key, least)
        if type(value) is not int or value < least:
            raise ValueError(f"{key} must be a whole number of {least} or more, got {value!r}")
    for key in ("test", "skip_done"):
        if not isinstance(config.get(key, False), bool):
            raise ValueError(f"{key} must be true or false, got {config[key]!r}")
    if multirun and is_distributed(config):
        raise ValueError(
            "trainer.strategy=ddp cannot run under -m: its processes would start the sweep again; "
            "run the jobs one by one, or sweep with one device each"
        )


def check_choices(config: Config) -> None:
    """Refuse what was typed and would be passed over: a new value at the top, a recipe that does not exist.

    Recipes, experiments and sweeps are optional, because not every data set has a recipe, and Hydra passes
    over what is missing.

    Raises:
        ValueError: Naming what there is.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    given = {override.partition("=")[0].lstrip("+") for override in HydraConfig.get().overrides.task}
    added = [o.lstrip("+").partition("=")[0] for o in HydraConfig.get().overrides.task if o[0] == "+"]
    keys = _top_level_keys()
    for key in added:
        if key.isidentifier() and key not in keys and not key.startswith("_"):
            near = _paths_to(key, config) or get_close_matches(key, keys, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(keys))}"
            raise ValueError(
                f"nothing reads {key!r} ({key}: {config[key]!r}): {hint} "
                "(a value of your own, for interpolation, begins with an underscore)"
            )
    chosen = HydraConfig.get().runtime.choices
    for group in ("recipe", "experiment", "sweep"):
        names = chosen.get(group) if group in given else None
        for name in [names] if isinstance(names, str) else names or []:
            known = GlobalHydra.instance().config_loader().get_group_options(group)
            if name not in known:
                raise ValueError(f"{group}={name}: there is no such {group}; known are {', '.join(known)}")


def _top_level_keys() -> set[str]:
    """What a configuration may hold: the keys of train.yaml, its groups, and ``base`` of BAM."""
    file = yaml.safe_load((_configuration_files() / "train.yaml").read_text(encoding="utf-8"))
    groups = {name for entry in file["defaults"] if isinstance(entry, dict) for name in entry}
    return {*file, *groups, "base"} - {"defaults", "hydra"}


def _paths_to(name: str, node: Mapping[str, Any], path: str = "") -> list[str]:
    """Dotted paths of the values below the top level that have this name, the highest first."""
    found = []
    for key, value in node.items():
        if isinstance(value, Mapping):
            found += [f"{path}{key}.{name}"] if name in value else []
            found += _paths_to(name, value, f"{path}{key}.")
    return sorted(found, key=lambda place: place.count("."))


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
