"""A run folder that an earlier version made is evaluated, resumed and used as it was then.

``earlier_run/`` is one of version 0.1.0 (commit f34c91c), trained by the command in its metrics.json. The
numbers are what that version gave on an Intel Xeon with torch 2.14.1; float32 rounds otherwise elsewhere.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from svf_lightning import FewShotPredictor
from svf_lightning.data.emoji import Emoji
from svf_lightning.runs import earlier
from svf_lightning.training.checkpoints import load_checkpoint

RUN = Path(__file__).parent / "earlier_run"
EMOJI = {"train_images": 60, "val_images": 30, "image_size": 64}
NEAR = 1e-3


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "emoji"
    Emoji(root, **EMOJI).ensure()
    return root


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(RUN, tmp_path / "run"))


def test_it_scores_what_it_scored(folder, emoji, call):
    call(evaluate.main, f"run={folder}", f"root={emoji}")
    again = json.loads((folder / "evaluation.json").read_text())
    then = json.loads((folder / "metrics.json").read_text())
    assert again["protocol"]["digests"] == then["protocol"]["digests"]
    assert again["miou_mean"] == pytest.approx(then["miou"], abs=NEAR)
    assert again["seeds"][0]["fb_iou"] == pytest.approx(then["fb_iou"], abs=NEAR)

    call(evaluate.main, f"run={folder}", f"root={emoji}", "episodes=40", "shot=2")
    assert json.loads((folder / "evaluation.json").read_text())["miou_mean"] == pytest.approx(
        0.09701329705645884, abs=NEAR
    )


def test_it_resumes_to_the_weights_that_it_would_have_had(folder, emoji, call):
    then = json.loads((folder / "metrics.json").read_text())["command"].split()[1:]
    own = ("data_dir=", "trainer.max_epochs=", "hydra.run.dir=")
    call(
        train.main,
        *(override for override in then if not override.startswith(own)),
        f"data_dir={emoji.parent}",
        f"hydra.run.dir={folder}",
        "trainer.max_epochs=3",
        "resume=last",
        "test=false",
    )
    checkpoint = load_checkpoint(folder / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 60  # 3 epochs of 20
    total = sum(float(value.double().abs().sum()) for value in checkpoint["state_dict"].values())
    assert total == pytest.approx(12138.511642010355, rel=1e-4)
    s = checkpoint["state_dict"]["model.backbone.layer4.0.0.conv_dw.s"]
    assert float(s.double().sum()) == pytest.approx(266.5914503335953, rel=1e-4)


def test_it_predicts_what_it_predicted(folder, emoji):
    images = sorted((emoji / "JPEGImages").iterdir())
    label = np.array(Image.open(sorted((emoji / "SegmentationClassAug").iterdir())[0]))
    with torch.random.fork_rng():
        predictor = FewShotPredictor(folder, device="cpu")
    results = predictor.fit([images[0]], [(label == 7).astype(np.uint8)]).predict(images[1:6])
    assert [int((result.mask == 1).sum()) for result in results] == pytest.approx(
        [1883, 1916, 1939, 1932, 1951], abs=20
    )
    assert [float(result.margins.double().mean()) for result in results] == pytest.approx(
        [-0.2568170292, -0.2216642886, -0.1927486941, -0.203225323, -0.1896691626], abs=NEAR
    )


def test_a_configuration_of_today_is_left_as_it_is():
    config = {
        "model": {"_target_": "svf_lightning.training.segmenter.FewShotSegmenter", "network": {}},
        "trainer": {"default_root_dir": "runs/x"},
    }
    assert earlier.update(json.loads(json.dumps(config))) == config
