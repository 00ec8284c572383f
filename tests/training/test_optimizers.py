"""Two optimizers that step as one: what CyCTR's recipe needs."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from svf_lightning.episode import Episode, Prediction
from svf_lightning.training.optimizers import JointOptimizer
from svf_lightning.training.segmenter import FewShotSegmenter

RECIPE = {"optimizer": "sgd", "lr": 0.1, "backbone_lr_factor": 0.5, "momentum": 0.9, "weight_decay": 0.01}
SEPARATE = {"module": "transformer", "lr": 0.03, "weight_decay": 0.2}


class Method(nn.Module):
    """Two channels a pixel, from three layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Conv2d(3, 4, 1)
        self.transformer = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(1, 4))
        self.cls = nn.Conv2d(4, 2, 1)

    def forward(self, episode):
        return Prediction(self.cls(self.transformer(self.backbone(episode.query_image))))


def episodes():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(6, 3, 4, 4, generator=generator)
    mask = (torch.rand(6, 4, 4, generator=generator) < 0.5).long()
    one = torch.tensor(1)
    return [Episode(i, m, i[None], m[None], one, one, one[None]) for i, m in zip(image, mask, strict=True)]


class Rates(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def fit(folder, epochs, checkpoint=None):
    segmenter = FewShotSegmenter(Method(), [1], **RECIPE, separate=SEPARATE, schedule="poly", epochs=2)
    rates = Rates()
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[rates],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(segmenter, DataLoader(episodes(), batch_size=2), ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return segmenter, rates.seen


def by_hand(steps):
    """The same training with the two optimizers of the official recipe, stepped one after the other."""
    model = Method()
    sgd = torch.optim.SGD(
        [
            {"params": list(model.cls.parameters()), "lr": 0.1},
            {"params": list(model.backbone.parameters()), "lr": 0.05},
        ],
        momentum=0.9,
        weight_decay=0.01,
    )
    named = list(model.transformer.named_parameters())
    adamw = torch.optim.AdamW(
        [
            {"params": [p for n, p in named if "bias" not in n], "weight_decay": 0.2},
            {"params": [p for n, p in named if "bias" in n], "weight_decay": 0.0},
        ],
        lr=0.03,
    )
    batches = list(DataLoader(episodes(), batch_size=2))
    for step in range(steps):
        factor = (1 - (step + 1) / 6) ** 0.9
        sgd.param_groups[0]["lr"], sgd.param_groups[1]["lr"] = 0.1 * factor, 0.05 * factor
        batch = batches[step % 3]
        loss = nn.functional.cross_entropy(model(batch).logits, batch.query_mask)
        for optimizer in (sgd, adamw):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (sgd, adamw):
            optimizer.step()
    return model


def test_the_submodule_learns_by_adamw_and_the_rest_by_scheduled_sgd(tmp_path):
    segmenter, rates = fit(tmp_path, epochs=1)
    expected = by_hand(steps=3)
    for name, parameter in expected.named_parameters():
        ours = segmenter.model.get_parameter(name)
        torch.testing.assert_close(ours, parameter, atol=1e-6, rtol=1e-5, msg=name)
    assert [r[2:] for r in rates] == [[0.03, 0.03]] * 3  # constant
    assert rates[2][0] == pytest.approx(0.1 * (3 / 6) ** 0.9)


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_never_stopped(tmp_path):
    whole, _ = fit(tmp_path, epochs=2)
    fit(tmp_path, epochs=1)
    resumed, _ = fit(tmp_path, epochs=2, checkpoint=tmp_path / "1.ckpt")
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), parameter), name
    saved = torch.load(tmp_path / "1.ckpt", weights_only=True)["optimizer_states"][0]
    assert sum("exp_avg" in state for state in saved["state"].values()) == 4  # the transformer's
    assert sum("momentum_buffer" in state for state in saved["state"].values()) == 4


def test_a_loaded_state_belongs_to_the_inner_optimizers_too():
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    joint = JointOptimizer(torch.optim.SGD(weights[:1], lr=0.1, momentum=0.5), torch.optim.Adam(weights[1:]))
    for weight in weights:
        weight.grad = torch.ones(2)
    joint.step()
    state = copy.deepcopy(joint.state_dict())
    state["param_groups"][0]["lr"] = 10.0
    joint.load_state_dict(state)
    joint.step()
    # momentum 0.5 x 1 + 1, at the loaded rate
    torch.testing.assert_close(weights[0].detach(), torch.full((2,), 1 - 0.1 - 10 * 1.5))
    assert joint.state[weights[1]]["step"] == 2


def test_a_submodule_that_does_not_exist_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"separate.module='attention' is no submodule of Method; it has .*cls"
    ):
        FewShotSegmenter(Method(), [1], separate={**SEPARATE, "module": "attention"})
