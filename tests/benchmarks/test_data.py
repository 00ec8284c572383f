"""`svf benchmark data`, on a few small images: that it measures what it says."""

import re

import pytest
import torch
import torch.utils.data
from typer.testing import CliRunner

from svf_lightning.benchmarks import data as benchmark
from svf_lightning.cli import app
from svf_lightning.data import index as index_module
from svf_lightning.data import transforms

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")  # torchvision.io's


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return benchmark.make_images(tmp_path_factory.mktemp("made"), 6, width=60, height=45)


def test_images_are_of_both_orientations_and_classes(index):
    assert {tuple(index.read(i)[0].shape) for i in range(6)} == {(3, 45, 60), (3, 60, 45)}
    assert {i: set(index.read(i)[1].unique().tolist()) for i in (0, 1)} == {0: {0, 1, 255}, 1: {0, 2, 255}}


def test_the_steps_add_up_to_the_whole_and_training_alone_rotates(index):
    train, test = benchmark.measure(index, size=33, shots=[1], rounds=1, episodes=4)

    for speed in (train, test):
        *steps, (name, everything) = speed.milliseconds.items()
        assert name == "everything"
        assert sum(milliseconds for _, milliseconds in steps) == pytest.approx(everything)
        assert everything == pytest.approx(1000 / speed.episodes_per_second)
        for step in ("decode the image", "decode the label", "resize", "collate, batches of 4"):
            assert 0 < speed.milliseconds[step] < everything, step
    assert train.milliseconds["rotate (half of them)"] > 0 == test.milliseconds["rotate (half of them)"]


def test_every_function_that_time_is_booked_on_exists():
    # else a renamed one would silently count as 0
    for name in benchmark.STEPS:
        assert any(hasattr(module, name) for module in (index_module, transforms, torch.utils.data)), name


def test_every_way_to_decode_and_to_augment_is_timed(index):
    decoders = benchmark.compare_decoders(index, size=33, rounds=1)
    augmentations = benchmark.compare_augmentations(index, size=33, rounds=1)

    assert min(decoders.values()) > 0
    assert {"Pillow (ours)", "Pillow, draft mode"} <= set(decoders)
    assert min(augmentations.values()) > 0
    assert len(augmentations) == 4


def test_the_command_prints_tables_and_leaves_the_threads_as_they_were(monkeypatch):
    make = benchmark.make_images
    monkeypatch.setattr(benchmark, "make_images", lambda folder, count: make(folder, count, 60, 45))
    threads = torch.get_num_threads()
    arguments = ["benchmark", "data", "--size", "33", "--shot", "2", "--images", "6", "--rounds", "1"]
    result = CliRunner().invoke(app, arguments)

    assert result.exit_code == 0, result.output
    assert "| | training, 2 shot | test, 2 shot |" in result.output
    assert re.search(r"\*\*episodes/s\*\* \| \*\*[\d.]+\*\* \| \*\*[\d.]+\*\* \|", result.output)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--size", "4"], "size is 4; the benchmark needs at least 8"),
        (["--shot", "0"], "shot is 0; the benchmark needs at least 1"),
        (["--images", "3"], "images is 3; the benchmark needs at least 12"),
        (["--rounds", "0"], "rounds is 0; the benchmark needs at least 1"),
    ],
)
def test_a_number_too_small_ends_in_one_line(option, message):
    result = CliRunner().invoke(app, ["benchmark", "data", *option])

    assert result.exit_code == 1
    assert result.output.splitlines() == [f"error: {message}"]
