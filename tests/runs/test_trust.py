"""Hostile run folders, checkpoints and kilobyte files: whoever opens them, nothing in them is executed."""

import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import evaluate
from svf_lightning import FewShotPredictor, FewShotSegmenter, load_run
from svf_lightning.analysis import spectra
from svf_lightning.backbones.weights import read_state_dict
from svf_lightning.cli import app
from svf_lightning.objects import build_object
from svf_lightning.runs.export import export_onnx, export_singular_values, merge_run, restore_run
from svf_lightning.svf import files as singular_files
from svf_lightning.training.base_learner import load_base
from svf_lightning.training.checkpoints import load_checkpoint
from tests.conftest import TINY
from train import main


@pytest.fixture(scope="module")
def run(tmp_path_factory, emoji_folder):
    """A finished tiny run; with its kilobyte file beside it."""
    folder = tmp_path_factory.mktemp("runs") / "svf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sys.argv",
            [
                "train.py",
                *TINY,
                f"data_dir={emoji_folder}",
                f"hydra.run.dir={folder}",
                "epochs=1",
                "test=false",
            ],
        )
        main()
    export_singular_values(folder, folder.parent / "run.safetensors", head=True)
    return folder


@pytest.fixture
def called(tmp_path):
    """The file that a payload makes when it is executed."""
    return tmp_path / "called"


def payloads(called):
    """What a hostile configuration may name, by what it tries."""
    touch = f"touch {called}"
    return {
        "a command of torch": {"_target_": "torch.utils.collect_env.run", "command": touch},
        "a command of the system": {"_target_": "os.system", "_args_": [touch]},
        "a process, later": {"_target_": "subprocess.run", "_partial_": True, "args": touch, "shell": True},
        "code": {"_target_": "builtins.exec", "_args_": [f"open({str(called)!r}, 'w')"]},
        "a name that reaches out": {"_target_": "svf_lightning.data.emoji.os.system", "_args_": [touch]},
        "a writer of ours": {"_target_": "svf_lightning.files.write_whole", "path": str(called), "text": ""},
        "a writer beside a part": {
            "_target_": "svf_lightning.training.base_learner.save_base",
            "path": str(called),
        },
        "a class that makes folders": {
            "_target_": "pytorch_lightning.loggers.CSVLogger",
            "save_dir": str(called),
        },
        "a method": {"_target_": "svf_lightning.models.baseline.Baseline.forward"},
        "a private name": {"_target_": "svf_lightning.models.cyctr._norm"},
        "no text": {"_target_": ["os", "system"], "_args_": [touch]},
        "left to the called code": {
            "_target_": "svf_lightning.finetune.frozen.prepare",
            "_recursive_": False,
            "_convert_": "object",
            "backbone": {"_target_": "os.system", "_args_": [touch]},
        },
        "among arguments": {
            "_target_": "svf_lightning.finetune.frozen.prepare",
            "_args_": [[{"deep": {"_target_": "os.system", "_args_": [touch]}}]],
        },
    }


PAYLOADS = list(payloads(Path("called")))


def hostile(config, payload, place="finetune"):
    """A configuration with a payload at a dotted place; the original stays as it is."""
    config = copy.deepcopy(config)
    node = config
    *way, last = place.split(".")
    for key in way:
        node = node[key]
    node[last] = payload
    return config


def hostile_run(run, folder, payload, place="finetune"):
    """A copy of a run folder whose configuration has a payload."""
    shutil.copytree(run, folder)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(hostile(config, payload, place)))
    return folder


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_run_folder_calls_nothing_but_parts_of_a_run(run, tmp_path, called, name):
    folder = hostile_run(run, tmp_path / "run", payloads(called)[name])
    with pytest.raises(ValueError, match=r"config.yaml wants to call .* \(finetune.*trust=\[MODULE\]"):
        load_run(folder)
    assert not called.exists()


PLACES = (
    *("data", "data.source", "data.augment", "backbone.weights", "model", "model.network", "model.loss"),
    *("model.network.backbone", "trainer", "trainer.strategy", "trainer.plugins", "trainer.callbacks"),
    *("trainer.logger", "trainer.profiler"),
)


@pytest.mark.parametrize("place", PLACES)
def test_no_part_of_a_run_folder_may_hold_a_payload(run, tmp_path, called, place):
    payload = payloads(called)["a command of torch"]
    needed = {} if "." in place else {"source": {}, "network": {}}
    folder = hostile_run(run, tmp_path / "run", {**payload, **needed}, place)
    with pytest.raises(ValueError, match=rf"'torch.utils.collect_env.run' \({place}\)"):
        load_run(folder, classes=(1,))
    assert not called.exists()


DOORS = {
    "svf predict": lambda r, d: ["predict", d, "--support", d, "--checkpoint", r, "--output", d / "o"],
    "svf merge": lambda r, d: ["merge", r, d / "out"],
    "svf export, values": lambda r, d: ["export", r, "--singular-values", d / "out"],
    "svf export, onnx": lambda r, d: ["export", r, "--onnx", d / "out"],
    "svf restore": lambda r, d: ["restore", r.parent / "hostile.safetensors", d / "out"],
}


@pytest.fixture
def shared(run, tmp_path, called):
    """A folder with a picture, and a hostile run and kilobyte file, each with the same payload."""
    payload = payloads(called)["a command of torch"]
    folder = hostile_run(run, tmp_path / "shared" / "run", payload)
    values = singular_files.read(run.parent / "run.safetensors")
    values.about["config"] = hostile(values.about["config"], payload)
    singular_files.write(folder.parent / "hostile.safetensors", values)
    return folder


@pytest.mark.parametrize("door", DOORS)
def test_no_command_opens_a_hostile_file_unless_its_author_is_trusted(
    shared, tmp_path, called, door, monkeypatch, emoji_folder
):
    monkeypatch.setattr("svf_lightning.own_images.command.find_queries", lambda *_: ({Path("a"): "a"}, []))
    arguments = [str(argument) for argument in DOORS[door](shared, tmp_path)]
    if door == "svf export, onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1
    assert "wants to call 'torch.utils.collect_env.run' (finetune)" in refused.output
    assert not called.exists()
    assert not (tmp_path / "out").exists()

    CliRunner().invoke(app, [*arguments, "--trust", "some.other", "--trust", "torch.utils"])
    assert called.exists()  # so the payload works, and `--trust` is what lets it


def test_evaluate_refuses_a_hostile_run_folder(shared, called, call, capsys):
    with pytest.raises(SystemExit):
        call(evaluate.main, f"run={shared}", "trust=some.other")
    assert "wants to call 'torch.utils.collect_env.run' (finetune)" in capsys.readouterr().err
    assert not called.exists()


@pytest.mark.parametrize(
    "open_run",
    [
        load_run,
        FewShotPredictor,
        lambda r: merge_run(r, r.parent / "out"),
        lambda r: export_singular_values(r, r.parent / "out"),
        lambda r: restore_run(r.parent / "hostile.safetensors", r.parent / "out"),
    ],
)
def test_python_refuses_a_hostile_file(shared, called, open_run):
    with pytest.raises(ValueError, match=r"wants to call 'torch.utils.collect_env.run' \(finetune\)"):
        open_run(shared)
    assert not called.exists()
    assert not (shared.parent / "out").exists()


def test_onnx_refuses_a_hostile_run_folder(shared, called, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with pytest.raises(ValueError, match="wants to call"):
        export_onnx(shared, tmp_path / "out")
    assert not called.exists()


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_checkpoint_and_a_kilobyte_file_call_nothing_but_parts_of_a_run(run, tmp_path, called, name):
    payload = payloads(called)[name]
    content = load_checkpoint(run / "checkpoints" / "last.ckpt")
    for place in ("finetune", "model.network.backbone"):
        torch.save(
            {**content, "configuration": hostile(content["configuration"], payload, place)}, tmp_path / "x"
        )
        with pytest.raises(ValueError, match=rf"x wants to call .* \({place}"):
            FewShotSegmenter.load_from_checkpoint(tmp_path / "x")
    values = singular_files.read(run.parent / "run.safetensors")
    values.about["config"] = hostile(values.about["config"], payload, "data.source")
    singular_files.write(tmp_path / "y", values)
    with pytest.raises(ValueError, match=r"y wants to call .* \(data.source"):
        restore_run(tmp_path / "y", tmp_path / "out")
    assert not called.exists()


def test_a_run_goes_on_from_a_hostile_checkpoint_without_calling_it(run, tmp_path, called, train):
    """What is called is what the command line names; the configuration in the checkpoint is not asked."""
    folder = hostile_run(run, tmp_path / "shared", payloads(called)["a command of torch"])
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    content["configuration"] = hostile(
        content["configuration"], payloads(called)["a command of the system"], "model.network"
    )
    torch.save(content, tmp_path / "hostile.ckpt")
    train(tmp_path / "run", f"resume={tmp_path / 'hostile.ckpt'}", "epochs=1", "test=false")
    assert not called.exists()


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, called):
        self.called = called

    def __reduce__(self):
        return os.mkdir, (str(self.called),)


def as_array(payload, path):
    values = np.array([payload, None], dtype=object)
    np.savez(path, epochs=values, layer2=values)


READERS = {
    "a checkpoint": ("checkpoints/last.ckpt", load_run),
    "a checkpoint alone": ("x.ckpt", lambda f: FewShotSegmenter.load_from_checkpoint(f / "x.ckpt")),
    "a checkpoint to go on from": ("x.ckpt", lambda f: load_checkpoint(f / "x.ckpt")),
    "pretrained weights": ("x.pth", lambda f: read_state_dict(f / "x.pth", "weights")),
    "an official checkpoint": ("x.pth", lambda f: read_state_dict(f / "x.pth", "an official checkpoint")),
    "a base learner": (
        "base.pth",
        lambda f: load_base(torch.nn.Identity(), f / "base.pth", source=None, fold=0),
    ),
    "a kilobyte file": ("x.safetensors", lambda f: restore_run(f / "x.safetensors", f / "out")),
    "spectra": ("spectra.npz", spectra.read),
}


@pytest.mark.parametrize("bare", [False, True], ids=["beside weights", "bare"])
@pytest.mark.parametrize("name", READERS)
def test_no_file_that_is_read_is_unpickled(run, tmp_path, called, name, bare):
    file, read = READERS[name]
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    if file.endswith(".npz"):
        as_array(Payload(called), folder / file)
    else:
        content = {} if bare else torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        torch.save({**content, "hyper_parameters": Payload(called)}, folder / file)
    with pytest.raises(ValueError, match=r"cannot be read|damaged"):
        read(folder)
    assert not called.exists()


def test_a_tag_in_a_configuration_is_not_followed(run, tmp_path, called):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    text = (run / "config.yaml").read_text()
    (folder / "config.yaml").write_text(f"{text}\nx: !!python/object/apply:os.system ['touch {called}']\n")
    with pytest.raises((ValueError, yaml.YAMLError), match="python/object/apply"):
        load_run(folder)
    assert not called.exists()


@pytest.mark.parametrize(
    "text", ["${oc.env:SVF_SECRET}", "${hydra:runtime.cwd}", "${oc.decode:'[1]'}", "${x}"]
)
def test_text_that_looks_like_an_interpolation_stays_text(text, monkeypatch):
    monkeypatch.setenv("SVF_SECRET", "password")
    node = {"_target_": "svf_lightning.data.emoji.Emoji", "root": text}
    assert build_object({"_target_": "builtins.dict", "source": node, "names": [text]}, "data")["names"] == [
        text
    ]
    assert build_object(node, "data.source").root == text


def test_weights_are_fetched_from_nowhere_else_than_the_argument_says():
    node = {"_target_": "svf_lightning.backbones.timm.timm_features", "name": "test_efficientnet.r160_in1k"}
    for option in ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained"):
        with pytest.raises(ValueError, match=f"weights from weights=, not from {option}="):
            build_object({**node, option: "x.pth"}, "backbone")
    for name in ("hf-hub:somebody/resnet18", "local-dir:/tmp/resnet18"):
        with pytest.raises(ValueError, match="has no network"):
            build_object({**node, "name": name}, "backbone")


def test_the_kilobyte_file_of_an_honest_run_is_restored(run, tmp_path):
    restore_run(run.parent / "run.safetensors", tmp_path / "out")
    assert json.dumps(load_run(tmp_path / "out")[0]["data"])
