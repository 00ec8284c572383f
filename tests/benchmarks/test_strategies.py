"""`svf benchmark svf`, on a network of a few channels: what must hold whatever the machine does."""

import copy
import re

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from svf_lightning.backbones.backbone import Backbone
from svf_lightning.benchmarks import strategies as benchmark
from svf_lightning.cli import app
from svf_lightning.finetune import frozen, full, svf

QUICK = benchmark.Setting(rounds=1)
IMAGES = torch.zeros(2, 3, 17, 17)


def made_backbone(norm=nn.BatchNorm2d, depth=1):
    torch.manual_seed(0)

    def stage():
        return [m for _ in range(depth) for m in (nn.Conv2d(8, 8, 3, padding=1), norm(8), nn.ReLU())]

    stages = [nn.Conv2d(3, 8, 1), *(nn.Sequential(*stage()) for _ in range(4))]
    return Backbone(stages, [8] * 5, [1] * 5).eval()


def rows(lines):
    return {cells[1]: cells[2:-1] for line in lines if (cells := [c.strip() for c in line.split("|")])[1:]}


def test_every_strategy_has_a_row_and_the_references_are_one():
    names = [name for name in benchmark.strategies(()) if name not in ("vpt", "svf_rank30", "lora", "dora")]
    ways = benchmark.strategies(names)
    costs, left_out = benchmark.compare(made_backbone(), {**ways}, IMAGES, QUICK, skip=True)
    # this network has one size of kernel only
    assert [sentence.split(":")[0] for sentence in left_out] == ["Without part_1x1"]
    table = rows(benchmark.table(costs))

    of = {label.split(" (from")[0]: cells for label, cells in table.items()}
    assert {"floor", benchmark.PUBLISHED, benchmark.REBUILT, *names} - {"part_1x1"} <= set(of)
    assert of["floor"][4] == of["floor"][7] == "1.00"
    assert of[benchmark.PUBLISHED][6] == "1.00"
    assert {label for label in table if "(from layer1)" in label} == {
        "full (from layer1)",
        "svf_layers1234 (from layer1)",
    }


def test_what_is_counted_as_trained_is_what_trains():
    costs = benchmark.measure(made_backbone(), {"frozen": frozen.prepare, "svf": svf.prepare}, IMAGES, QUICK)
    assert (costs["frozen"].trained, costs["svf"].trained) == (0, 3 * 8)


def test_seconds_of_the_parts_fit_into_those_of_the_whole():
    cost = benchmark.measure(made_backbone(), {"full": full.prepare}, IMAGES, QUICK)["full"]
    assert cost.forward + cost.backward == pytest.approx(cost.training)  # of one round
    assert 0 < cost.training <= cost.step
    assert cost.evaluation > 0


def test_peak_memory_is_what_the_tensors_hold():
    def hold_three_then_two():
        a, b, c = (torch.empty(1000) for _ in range(3))
        del a, c
        return b + 1

    assert benchmark._peak_bytes(hold_three_then_two, QUICK) == 3 * 4000


def test_memory_is_the_same_on_every_run_and_the_published_form_takes_more():
    ways = {"ours": svf.prepare, "published": benchmark.prepare_published}
    first, second = (benchmark.measure(made_backbone(depth=4), ways, IMAGES, QUICK) for _ in range(2))
    assert [cost.memory for cost in first.values()] == [cost.memory for cost in second.values()]
    assert first["published"].memory > first["ours"].memory


@pytest.mark.parametrize("prepare", [benchmark.prepare_published, benchmark.prepare_rebuilt])
def test_the_other_forms_compute_what_the_frozen_network_does_and_train_as_many_numbers(prepare):
    backbone, x = made_backbone().requires_grad_(False), torch.randn(2, 3, 9, 9)
    tuned, ours = copy.deepcopy(backbone), copy.deepcopy(backbone)
    prepare(tuned)
    svf.prepare(ours)

    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 3 * 8
    torch.testing.assert_close(tuned(x)[-1], backbone(x)[-1], atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(tuned(x)[-1].sum(), trained)
    expected = torch.autograd.grad(ours(x)[-1].sum(), [p for p in ours.parameters() if p.requires_grad])
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-5)


def test_the_backbone_itself_stays_as_it_is():
    backbone = made_backbone()
    before = copy.deepcopy(backbone.state_dict())
    benchmark.measure(backbone, {"svf": svf.prepare}, IMAGES, QUICK)
    assert str(backbone) == str(made_backbone())
    torch.testing.assert_close(backbone.state_dict(), before, atol=0, rtol=0)


def test_a_strategy_that_does_not_fit_is_refused_by_name_if_asked_for():
    with pytest.raises(ValueError, match="bn: stages: 'layer2' holds no BatchNorm"):
        benchmark.compare(made_backbone(nn.Identity), benchmark.strategies(["bn"]), IMAGES, QUICK)


def test_the_command_measures_a_resnet50_and_leaves_the_threads_as_they_were(monkeypatch):
    small = made_backbone()
    monkeypatch.setattr(benchmark, "resnet50", lambda weights: small)
    threads = torch.get_num_threads()
    arguments = (
        "benchmark strategies --strategy svf_rank30 --rank 4 --size 33 --batch 1 --rounds 1 --dtype bfloat16"
    )
    result = CliRunner().invoke(app, [*arguments.split(), "--channels-last"])

    assert result.exit_code == 0, result.output
    assert "one CPU thread, bfloat16, channels last, ResNet-50, 1 x 33 x 33, best of 1." in result.output
    assert re.search(r"\| svf_rank30 \| 12 \|", result.output)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--strategy svff",
            "strategy: there is no 'svff' in conf/finetune; did you mean svf, svf_v, svf_u?",
        ),
        ("--strategy vpt", "vpt: "),
        ("--size 4", "size is 4; the benchmark needs at least 33"),
        ("--batch 0", "batch is 0; the benchmark needs at least 1"),
        ("--rounds 0", "rounds is 0; the benchmark needs at least 1"),
        ("--device mps", "device is 'mps'; here there is cpu"),
        ("--dtype float16", "dtype is 'float16'; give float32 or bfloat16"),
    ],
)
def test_what_is_not_there_or_too_small_ends_in_one_line(monkeypatch, option, message):
    monkeypatch.setattr(benchmark, "resnet50", lambda weights: made_backbone())
    result = CliRunner().invoke(app, ["benchmark", "strategies", *option.split()])

    assert result.exit_code == 1
    assert f"error: {message}" in result.output
