"""Shared by all tests: one thread, and the entry points called as a user calls them."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # train.py and evaluate.py belong to no package

# The smallest run that has everything: 60 + 30 images of 64 pixels, two epochs of two steps.
TINY = [
    "data.source.train_images=60",
    "data.source.val_images=30",
    "data.source.image_size=64",
    "data.image_size=65",
    "data.batch_size=4",
    "data.episodes_per_epoch=8",
    "data.val_episodes=4",
    "data.test_episodes=6",
    "model.network.channels=8",
    "epochs=2",
]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def emoji_folder(tmp_path_factory):
    """Where the tiny emoji set is made, once."""
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture
def call(monkeypatch):
    """Call ``train.main`` or ``evaluate.main`` with a command line."""

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["main", *map(str, arguments)])
        main()

    return call


@pytest.fixture
def train(call, emoji_folder):
    """Train a tiny run into a folder."""
    from train import main

    def train(folder, *overrides):
        call(main, *TINY, f"data_dir={emoji_folder}", f"hydra.run.dir={folder}", *overrides)
        return Path(folder)

    return train
