"""Spectra: logged as they are, across a resume, and drawn where there are any."""

import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn

from svf_lightning.analysis import curves, report_figures, spectra
from svf_lightning.finetune import svf
from svf_lightning.svf.network import merge_svf
from svf_lightning.training.callbacks import SpectraLog


class Toy(pl.LightningModule):
    """Two factored layers; every step adds 1 to every singular value."""

    def __init__(self, factored=True):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.backbone = nn.ModuleDict(
            {"layer2": nn.Linear(3, 2), "layer3": nn.Linear(2, 2, bias=False)}
        )
        if factored:
            svf.prepare(self.model.backbone, ["layer2", "layer3"])

    def training_step(self, batch, _):
        return -sum(layer.s.sum() for layer in self.model.backbone.values() if hasattr(layer, "s")) + sum(
            0 * p.sum() for p in self.parameters()
        )

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(2, 1))  # two steps an epoch


def fit(folder, epochs, log, module=None, resume=None):
    module = module or Toy()
    trainer = pl.Trainer(
        max_epochs=epochs,
        default_root_dir=folder,
        callbacks=[log],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return module


def test_the_pretrained_values_and_those_of_every_epoch_are_written(tmp_path):
    start = Toy()
    fit(tmp_path, 3, SpectraLog())
    run = spectra.read(tmp_path)
    assert run.epochs.tolist() == [0, 1, 2, 3]
    first = torch.linalg.svdvals(nn.Module.state_dict(merge_svf(start.model.backbone))["layer2.weight"])
    for epoch in range(4):
        np.testing.assert_allclose(run.values["layer2"][epoch], first.numpy() + 2 * epoch, rtol=1e-5)
    assert run.values["layer3"].shape == (4, 2)


def test_a_resumed_run_goes_on_where_its_checkpoint_was_and_forgets_what_came_after(tmp_path):
    fit(tmp_path, 2, SpectraLog())
    whole = spectra.read(tmp_path)
    fit(tmp_path, 3, SpectraLog(), resume=tmp_path / "2.ckpt")  # one more
    fit(tmp_path, 4, SpectraLog(), resume=tmp_path / "2.ckpt")  # and once more from the same point
    run = spectra.read(tmp_path)
    assert run.epochs.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(run.values["layer2"][:3], whole.values["layer2"])
    np.testing.assert_allclose(np.diff(run.values["layer2"], axis=0), 2, rtol=1e-5)


def test_a_fresh_run_does_not_go_on_with_an_old_file(tmp_path):
    fit(tmp_path, 3, SpectraLog())
    fit(tmp_path, 1, SpectraLog())
    assert spectra.read(tmp_path).epochs.tolist() == [0, 1]


def test_entries_can_be_rarer_and_the_last_epoch_is_always_one(tmp_path):
    fit(tmp_path, 5, SpectraLog(every=2))
    assert spectra.read(tmp_path).epochs.tolist() == [0, 2, 4, 5]
    with pytest.raises(ValueError, match="every must be 1 or more"):
        SpectraLog(every=0)


def test_a_run_without_singular_values_leaves_no_file(tmp_path):
    fit(tmp_path, 1, SpectraLog(), Toy(factored=False))
    assert not (tmp_path / "spectra.npz").exists()


# ---- reading


def test_the_largest_values_are_those_that_were_so_at_first_whatever_their_order():
    run = spectra.Spectra(
        np.array([0, 1, 2]), {"layer2": np.array([[1.0, 9.0, 5.0], [0.0, 0.0, 0.0], [1.5, 9.0, 4.0]])}
    )
    assert spectra.change(run, largest=2)["layer2"].tolist() == [0.0, -1.0]
    assert spectra.change(run)["layer2"].tolist() == [0.0, -1.0, 0.5]
    assert spectra.relative_change(run)["layer2"] == pytest.approx((1.25 / 107) ** 0.5)


def test_a_layer_of_zeros_has_no_relative_change():
    run = spectra.Spectra(np.array([0, 1]), {"layer2": np.zeros((2, 3))})
    assert spectra.relative_change(run) == {"layer2": 0.0}


def test_layers_are_sorted_into_stages_kinds_and_blocks():
    names = ["layer2.0.conv1", "layer2.0.downsample.0", "layer2.1.conv1", "layer3.0.2.conv_dw", "layer4.3"]
    stages = spectra.by_stage({name: np.zeros(1) for name in names})
    layout = {stage: {kind: list(row) for kind, row in kinds.items()} for stage, kinds in stages.items()}
    assert layout == {
        "layer2": {"conv1": ["0", "1"], "downsample.0": ["0"]},
        "layer3": {"conv_dw": ["0.2"]},
        "layer4": {"": ["3"]},
    }


def test_a_missing_broken_or_headless_file_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no spectra\.npz"):
        spectra.read(tmp_path)
    (tmp_path / "spectra.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match=r"spectra\.npz cannot be read"):
        spectra.read(tmp_path)
    np.savez(tmp_path / "spectra.npz", epochs=[3, 4], layer2=np.ones((2, 2)))
    with pytest.raises(ValueError, match="begins at epoch 3"):
        spectra.read(tmp_path)


# ---- drawing


def finished(folder, strategy, fold=0, seed=0, mious=(0.25, 0.5)):
    """What a run leaves behind, as far as figures need it."""
    (folder / "csv").mkdir(parents=True)
    rows = [f"{epoch},{step},,{miou}" for epoch, (step, miou) in enumerate(enumerate(mious))]
    (folder / "csv" / "metrics.csv").write_text(
        "\n".join(["epoch,step,train/loss,val/miou", "0,0,0.7,", *rows])
    )
    identity = {
        "data": "emoji",
        "model": "baseline",
        "backbone": "b0",
        "finetune": strategy,
        "fold": fold,
        "shot": 1,
    }
    content = {
        "miou": mious[-1],
        "identity": identity,
        "seed": seed,
        "config": {"finetune": {"_target_": "x"}},
    }
    (folder / "metrics.json").write_text(json.dumps(content))
    return {**content, "run": folder.name}


def test_a_curve_is_read_from_the_rows_that_have_a_score(tmp_path):
    finished(tmp_path / "a", "svf", mious=(0.1, 0.3))
    epochs, miou = curves.read(tmp_path / "a" / "csv" / "metrics.csv")
    assert epochs.tolist() == [1, 2]
    assert miou.tolist() == [0.1, 0.3]


def test_strategies_are_compared_on_the_folds_that_all_of_them_have(tmp_path):
    results = [
        finished(tmp_path / "a", "svf", fold=0, mious=(0.25, 0.5)),
        finished(tmp_path / "b", "svf", fold=1, mious=(0.75, 1.0)),
        finished(tmp_path / "c", "frozen", fold=0, mious=(0.125, 0.25)),
    ]
    (only,) = curves.by_strategy(tmp_path, results).values()
    assert {name: miou.tolist() for name, (_, miou) in only.items()} == {
        "svf": [0.25, 0.5],
        "frozen": [0.125, 0.25],
    }


def test_every_run_with_spectra_gets_its_figures_and_all_together_their_curves(tmp_path):
    results = [finished(tmp_path / "a", "svf"), finished(tmp_path / "b", "frozen")]
    values = np.linspace(2, 1, 50)
    np.savez(
        tmp_path / "a" / "spectra.npz",
        epochs=[0, 1],
        **{"layer2.0.conv1": np.stack([values, values**1.01]), "layer3.0.conv1": np.ones((2, 4))},
    )
    drawn = report_figures.draw(tmp_path, results)
    assert {path.relative_to(tmp_path).as_posix() for path in drawn} == {
        "a/figures/spectra_largest_layer2.png",
        "a/figures/spectra_largest_layer3.png",
        "a/figures/spectra_all_layer2.png",
        "a/figures/spectra_all_layer3.png",
        "a/figures/spectra_layers.png",
        "figures/curves_emoji-baseline-b0-1shot.png",
    }
    for path in drawn:
        assert len(np.unique(np.asarray(Image.open(path).convert("L")))) > 10  # something is on it


def test_nothing_to_draw_is_an_error_that_says_so(tmp_path):
    result = finished(tmp_path / "a", "svf")
    (tmp_path / "a" / "csv" / "metrics.csv").unlink()
    with pytest.raises(FileNotFoundError, match="to draw"):
        report_figures.draw(tmp_path, [result])
