"""The rows and tables of the SVF paper: configurations, sweeps, and the report beside its numbers."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from torch import nn

from svf_lightning.analysis import tables
from svf_lightning.analysis.published import FROZEN, SVF, TABLES
from svf_lightning.backbones.resnet import resnet50
from svf_lightning.runs.run import build_part
from svf_lightning.training.callbacks import AfterSteps

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
ROWS = {row.finetune: row for table in TABLES.values() for row in table.rows}

# How many numbers train in a ResNet-50: the rows of the tables, and what else fits one.
RESNET50 = {
    "frozen": 0,
    "full": 23_232_512 + 212_992 + 64 * 64 + 64 * 256,  # layer1 behind the deep stem reads 64 channels more
    "part": 23_232_512,
    "part_layers34": 22_020_096,
    "part_layer4": 14_942_208,
    "part_1x1": 12_025_856,
    "part_3x3": 11_206_656,
    "bn": 50_176,
    "bn_weight": 25_088,
    "bn_bias": 25_088,
    "bn_svf": 50_176 + 12_544,
    "bias": 25_088,
    "svf": 12_544,
    "svf_u": 10_223_616,
    "svf_v": 18_120_704,
    "svf_us": 10_223_616 + 12_544,
    "svf_sv": 18_120_704 + 12_544,
    "svf_uv": 10_223_616 + 18_120_704,
    "svf_usv": 10_223_616 + 18_120_704 + 12_544,
    "svf_layer4": 5_632,
    "svf_layers34": 10_752,
    "svf_layers1234": 13_248,
    "svf_exp": 12_544,
    "svf_both": 25_088,
    "svb": 12_544,
    "spectral_clip": 23_232_512,
    "channel_scale": 50_176,
    "channel_scale_output": 25_088,
    "channel_scale_input": 21_504,
}


def strategy(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"finetune={name}"])
    return build_part({"finetune": OmegaConf.to_container(cfg.finetune, resolve=True)}, "finetune")


@pytest.fixture(autouse=True)
def factors_of_zeros(monkeypatch):
    """Factors of the right shape at no cost: counting needs no decomposition."""

    def decompose(weight, groups=1):
        factors = torch.linalg.svd(weight.detach().to("meta").flatten(1), full_matrices=False)
        return tuple(factors)

    monkeypatch.setattr("svf_lightning.svf.layer.decompose", decompose)


def test_every_row_of_the_tables_is_counted_here():
    assert set(ROWS) - set(RESNET50) == {"rotation"}  # drawing its matrices takes a minute


@pytest.mark.parametrize("name", RESNET50)
def test_a_configuration_trains_what_its_row_says(name):
    with torch.device("meta"):
        backbone = resnet50(weights=None)
    strategy(name)(backbone)
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == RESNET50[name]


@pytest.mark.parametrize("name", ROWS)
def test_the_head_of_a_configuration_states_the_published_number(name):
    head = "".join((CONF / "finetune" / f"{name}.yaml").read_text().splitlines(keepends=True)[:3])
    assert f"{ROWS[name].mean:.2f}" in head


@pytest.mark.parametrize("name", TABLES)
def test_a_sweep_runs_the_rows_of_its_table_on_all_folds(name):
    sweep = yaml.safe_load((CONF / "sweep" / f"{name}.yaml").read_text())["hydra"]
    assert sweep["mode"] == "MULTIRUN"
    assert sweep["sweeper"]["params"]["finetune"].split(",") == [row.finetune for row in TABLES[name].rows]
    assert sweep["sweeper"]["params"]["fold"] == "0,1,2,3"


@pytest.mark.parametrize("row", [FROZEN, SVF, *ROWS.values()], ids=lambda row: row.finetune)
def test_published_means_are_those_of_the_published_folds(row):
    if row.folds:
        assert row.mean == pytest.approx(sum(row.folds) / 4, abs=0.0076)  # rounding, of sums of four
    assert 40 < row.mean < 70


def made_run(folder, finetune, fold, miou):
    identity = {"data": "emoji", "model": "baseline", "backbone": "made", "finetune": finetune}
    result = {
        "miou": miou,
        "identity": {**identity, "fold": fold, "shot": 1},
        "config": {"finetune": {"_target_": finetune}},
    }
    (folder / f"{finetune}-{fold}").mkdir()
    (folder / f"{finetune}-{fold}" / "metrics.json").write_text(json.dumps(result))


def printed(grids):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for title, grid in grids:
        console.print(title, grid)
    return console.export_text()


def test_a_table_prints_our_numbers_above_the_published_ones(tmp_path):
    for fold, miou in enumerate((0.10, 0.20, 0.30, 0.41)):
        made_run(tmp_path, "svf_exp", fold, miou)
    made_run(tmp_path, "svf_both", 0, 0.5)
    made_run(tmp_path, "frozen", 0, 0.45)
    lines = printed(tables.published(tables.read_results(tmp_path), "table12")).splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert rows == [
        ["svf_exp", "", "✓", "run", "10.00", "20.00", "30.00", "41.00", "25.25"],
        ["", "", "", "paper", "67.16", "71.58", "68.59", "61.08", "67.10"],
        ["svf_both", "✓", "✓", "run", "50.00", "", "", "", ""],
        ["", "", "", "paper", "66.42", "71.73", "67.23", "61.12", "66.63"],
        ["frozen", "", "", "run", "45.00", "", "", "", ""],
        ["", "", "", "paper", "65.60", "70.28", "64.12", "60.27", "65.07"],
        ["svf", "", "", "run", "", "", "", "", ""],
        ["", "", "", "paper", "67.42", "71.57", "67.99", "61.57", "67.14"],
    ]


def test_an_unknown_table_or_one_without_runs_is_refused_by_name(tmp_path):
    made_run(tmp_path, "svf_exp", 0, 0.5)
    results = tables.read_results(tmp_path)
    with pytest.raises(ValueError, match=r"must be one of table05, table06, .*, table13; got 'table04'"):
        tables.published(results, "table04")
    with pytest.raises(ValueError, match=r"`python train\.py sweep=table07` makes them"):
        tables.published(results, "table07")


class Tiny(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = SimpleNamespace(backbone=nn.Identity())
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch, _):
        return (self.weight - 1).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


# Two epochs of five batches are ten steps, or six where two batches make a step: 2 + 2 + 1 in each epoch.
@pytest.mark.parametrize(("accumulate", "expected"), [(1, [2, 4, 6, 8, 10]), (2, [2, 4, 6])])
def test_a_function_acts_after_every_so_many_optimizer_steps(tmp_path, accumulate, expected):
    seen = []
    callback = AfterSteps(lambda backbone: seen.append((backbone, trainer.global_step)), every=2)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    module = Tiny()
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(5, 1)))
    steps = [step for _, step in seen]
    assert steps == expected
    assert all(backbone is module.model.backbone for backbone, _ in seen)


def test_acting_after_no_steps_is_refused():
    with pytest.raises(ValueError, match="every must be 1 or more optimizer steps, got 0"):
        AfterSteps(print, every=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_a_sweep_trains_two_epochs_on_emoji_and_its_table_prints(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    tiny = ["epochs=2", "data.episodes_per_epoch=16", "data.val_episodes=4", "data.test_episodes=8"]
    command = [f"sweep={name}", "fold=0", "trainer=cpu", f"hydra.sweep.dir={tmp_path}", *tiny]
    subprocess.run([sys.executable, "train.py", *command], check=True)
    results = tables.read_results(tmp_path)
    assert {r["identity"]["finetune"] for r in results} == {row.finetune for row in TABLES[name].rows}
    for result in results:
        # The score cannot tell: after four steps all is background, and so it is if all is NaN.
        path = tmp_path / result["run"] / "checkpoints" / "last.ckpt"
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        assert checkpoint["global_step"] == 4
        assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())
        moments = checkpoint["optimizer_states"][0]["state"].values()
        assert all(state["exp_avg_sq"].any() for state in moments)  # all that trains had a gradient
    assert name in printed(tables.published(results, name))
