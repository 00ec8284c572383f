"""Every configuration file composes, and names code that exists with arguments that it takes."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import OmegaConf

from svf_lightning.data.transforms import Augment, Letterbox
from svf_lightning.runs.evaluation import evaluate

CONF = Path(__file__).parents[2] / "conf"
FILES = sorted(
    path.relative_to(CONF).with_suffix("").as_posix()
    for path in CONF.glob("*/*.yaml")
    if path.parent.name != "protocol"  # a group of evaluate.yaml
)
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))

# What a choice needs beside itself, as its first comment says.
NEEDS = {"backbone/timm": ["backbone.name=resnet18"]}


def composed(*overrides, name="train"):
    """The whole configuration as train.py gets it, resolved, as plain values."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = compose(name, ["hydra.runtime.output_dir=out", *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    OmegaConf.set_readonly(config, False)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def targets(node, path=""):
    """Every node that names code, with the place where it stands."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from targets(value, f"{path}[{number}]")


def check(config):
    found = dict(targets(config))
    for path, node in found.items():
        code = get_object(node["_target_"])
        arguments = {key: value for key, value in node.items() if not key.startswith("_")}
        try:
            inspect.signature(code).bind_partial(**arguments)
        except TypeError as error:
            pytest.fail(f"{path}: {node['_target_']} {error}")
    return found


@pytest.mark.parametrize("file", FILES)
def test_a_choice_composes_and_names_code_that_takes_its_arguments(file):
    group, name = file.split("/")
    choice = [f"{group}={name}"]
    if group == "recipe" and name != "paper":  # train.yaml picks it by the data set
        choice = [f"data={name}"]
    found = check(composed(*choice, *NEEDS.get(file, [])))
    assert {"data", "data.source", "backbone", "model", "model.network", "finetune", "trainer"} <= set(found)


@pytest.mark.parametrize("model", MODELS)
def test_a_model_composes_with_its_papers_own_recipe(model):
    check(composed(f"model={model}", "data=pascal", "backbone=resnet50"))


# (epochs, validated every, batch, optimizer, rate, weight decay, schedule, foreground weight)
FOREGROUND = 3.0
RECIPES = {
    "baseline": (6, 2, 8, "adamw", 5e-3, 1e-2, "cosine", FOREGROUND),
    "pfenet": (6, 6, 8, "adamw", 3e-3, 1e-2, "cosine", FOREGROUND),
    "bam": (3, 3, 8, "adamw", 5e-3, 1e-2, "cosine", FOREGROUND),
    "cyctr": (6, 6, 8, "adamw", 1e-3, 1e-2, "cosine", None),
    "hsnet": (6, 6, 8, "adamw", 1e-3, 0.0, "cosine", FOREGROUND),
    "matcher": (0, 1, 8, "adamw", 5e-3, 1e-2, "constant", None),
    "cosine": (6, 6, 8, "adamw", 5e-3, 1e-2, "cosine", FOREGROUND),
}


def recipe(*overrides):
    config = composed(*overrides)
    model = config["model"]
    assert config["selection"] == "last"
    assert (model["epochs"], config["trainer"]["max_epochs"]) == (config["epochs"],) * 2
    validated = config["trainer"]["check_val_every_n_epoch"]
    numbers = (model["optimizer"], model["lr"], model["weight_decay"], model["schedule"])
    weight = model.get("loss", {}).get("foreground_weight")
    return config["epochs"], validated, config["data"]["batch_size"], *numbers, weight


@pytest.mark.parametrize("model", MODELS)
def test_a_model_has_its_recipe_on_the_built_in_data_set(model):
    assert recipe("data=emoji", f"model={model}") == RECIPES[model]


@pytest.mark.parametrize("model", MODELS)
def test_own_images_train_by_the_same_recipe_for_four_epochs(model):
    epochs, validated, *others = RECIPES[model]
    epochs, validated = (0, 1) if epochs == 0 else (4, 2 if validated == 2 else 4)
    assert recipe("data=folder", f"model={model}") == (epochs, validated, *others)


@pytest.mark.parametrize("data", ["emoji", "folder"])
@pytest.mark.parametrize("model", MODELS)
def test_the_recipe_of_the_paper_is_what_other_data_sets_get(model, data):
    ours = composed("recipe=paper", f"data={data}", f"model={model}")
    papers = composed("data=fss1000", f"model={model}", "fold=0")
    assert ours["epochs"] == papers["epochs"]
    assert ours["trainer"]["check_val_every_n_epoch"] == 1
    for config in (ours, papers):
        config["model"]["network"].pop("source", None)  # BAM's knows its data set
    assert ours["model"] == papers["model"]


def test_the_configuration_of_an_evaluation_is_what_evaluate_takes():
    arguments = composed("run=runs/some", name="evaluate")
    folder = arguments.pop("run")
    inspect.signature(evaluate).bind(folder, **arguments)


# The number of episodes and the seeds of the official test scripts.
PROTOCOLS = {
    "bam": (1000, [510, 365, 382, 322, 988]),
    "svf": (1000, [321]),
    "pfenet": (5000, [321]),
    "cyctr": (1000, [123]),
    "hsnet": (1000, [0]),
    "panet": (1000, [1234, 1235, 1236, 1237, 1238]),
}


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONF / "protocol").glob("*.yaml"))])
def test_a_protocol_has_the_published_episodes_and_seeds(name):
    config = composed("run=runs/some", f"protocol={name}", name="evaluate")
    assert (config["episodes"], config["seeds"]) == PROTOCOLS[name]


@pytest.mark.parametrize("data", [path.stem for path in sorted((CONF / "data").glob("*.yaml"))])
def test_a_data_set_asks_for_transform_settings_that_exist(data):
    config = composed(f"data={data}")["data"]
    for name, transform in (("augment", Augment), ("letterbox", Letterbox)):
        settings = {field.name for field in fields(transform)} - {"size", "mean", "std"}
        assert set(config.get(name) or {}) <= settings


# -- experiments

# (data set, method, strategy, head's learning rate, schedule, batch, epochs, novel images, test episodes):
# The settings of the official training scripts.
PASCAL, COCO = ("Pascal", 200), ("Coco", 50)
EXPECTED = {
    "table01_baseline_original": (*PASCAL, "Baseline", "frozen", 0.05, "poly", 8, "drop", 1000),
    "table01_baseline_ours": (*PASCAL, "Baseline", "frozen", 0.015, "cosine", 8, "drop", 1000),
    "table01_pfenet_original": (*PASCAL, "PFENet", "frozen", 0.025, "poly", 4, "drop", 1000),
    "table01_pfenet_ours": (*PASCAL, "PFENet", "frozen", 0.015, "cosine", 8, "drop", 1000),
    "table01_bam_original": (*PASCAL, "bam", "frozen", 0.05, "poly", 8, "drop", 1000),
    "table01_bam_ours": (*PASCAL, "bam", "frozen", 0.015, "cosine", 8, "drop", 1000),
    "table02_baseline": (*PASCAL, "Baseline", "frozen", 0.05, "poly", 8, "background", 1000),
    "table02_pfenet": (*PASCAL, "PFENet", "frozen", 0.025, "poly", 4, "background", 1000),
    "table02_bam": (*PASCAL, "bam", "frozen", 0.05, "poly", 8, "background", 1000),
    "table02_cyctr": (*PASCAL, "CyCTR", "frozen", 0.0375, "poly", 4, "background", 1000),
    "table02_cyctr_trick": (*PASCAL, "CyCTR", "frozen", 0.0375, "poly", 4, "drop", 1000),
    "table03_1000": (*COCO, "Baseline", "svf", 0.015, "cosine", 8, "drop", 1000),
    "table03_4000": (*COCO, "Baseline", "svf", 0.015, "cosine", 8, "drop", 4000),
    "table03_5000": (*COCO, "Baseline", "svf", 0.015, "cosine", 8, "drop", 5000),
    "table04_1shot": (*PASCAL, "Baseline", "svf", 0.015, "cosine", 8, "background", 1000),
    "table04_5shot": (*PASCAL, "Baseline", "svf", 0.015, "cosine", 8, "background", 1000),
}


def test_no_experiment_is_unknown_here():
    assert set(EXPERIMENTS) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_an_experiment_has_the_published_settings(name):
    config = composed(f"experiment={name}", "fold=2")
    data, model = config["data"], config["model"]
    assert (
        data["source"]["_target_"].split(".")[-1],
        config["epochs"],
        model["network"]["_target_"].split(".")[-1],
        config["finetune"]["_target_"].split(".")[-2],
        model["lr"],
        model["schedule"],
        data["batch_size"],
        data["novel_images"],
        data["test_episodes"],
    ) == EXPECTED[name]
    assert data["val_episodes"] == data["test_episodes"]  # the best validation is what was published
    assert config["backbone"]["_target_"].endswith("resnet50")
    assert config["backbone"]["dilation"] == ("uniform" if "bam" in name else "torchvision")
    assert config["selection"] == "novel"
    assert (data["fold"], data["shot"]) == (2, 5 if name.endswith("5shot") else 1)
    assert model["network"]["shot"] == data["shot"]


def test_no_two_experiments_share_a_folder():
    names = {name: composed(f"experiment={name}")["run_name"] for name in EXPECTED}
    same = {"table04_1shot", "table04_5shot"}  # apart by their shots
    assert len(set(names.values())) == len(names), names
    assert all("without_trick" in names[name] for name in same)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_says_its_command_its_published_numbers_and_their_source(name):
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# python train.py ")
    assert f"experiment={name} " in lines[1] + " "
    published = re.match(r"# Published: (?:([\d. ]+), )?mean ([\d.]+) %.*Table \d", lines[2])
    assert published, lines[2]
    folds, mean = published.groups()
    if folds is not None:
        values = [float(value) for value in folds.split()]
        assert len(values) == 4
        assert sum(values) / 4 == pytest.approx(float(mean), abs=0.06)  # CyCTR's row is off by 0.05 in print
