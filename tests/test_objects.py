"""Objects from configurations: wrong arguments are named, and files may call nothing but parts of a run."""

from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning import Callback, Trainer
from torch.utils.data import DataLoader, TensorDataset

from svf_lightning.objects import build_object, check_trust
from svf_lightning.training.callbacks import EpisodeProgress, _count
from svf_lightning.training.segmenter import FewShotSegmenter

ROOT = Path(__file__).parent.parent


def test_an_unknown_argument_is_named_with_its_file_and_the_nearest_one():
    node = {
        "_target_": "svf_lightning.training.losses.cross_entropy",
        "_partial_": True,
        "foreground_wait": 3,
    }
    with pytest.raises(ValueError, match="no argument 'foreground_wait'; did you mean 'foreground_weight'"):
        build_object(node, "model.loss")


def test_an_unknown_argument_typed_to_train_py_ends_in_one_line(train, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(tmp_path / "run", "+model.lrr=3", "test=false")
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: model (conf/model/baseline.yaml):")
    assert "no argument 'lrr'; did you mean 'lr'?" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "+base.lrr=3",
            "base (conf/model/bam.yaml): BaseSegmenter has no argument 'lrr'; did you mean 'lr'?",
        ),
        ("+trainer.max_epoch=3", "trainer: Trainer has no argument 'max_epoch'; did you mean 'max_epochs'?"),
        ("+data.source.train_image=3", "no argument 'train_image'; did you mean 'train_images'?"),
        ("+callbacks.spectra.evry=3", "callbacks.spectra: SpectraLog has no argument 'evry'"),
    ],
)
def test_a_wrong_name_anywhere_ends_in_one_line(train, tmp_path, capsys, override, message):
    method = "bam" if "base." in override else "baseline"
    with pytest.raises(SystemExit):
        train(tmp_path / "run", f"model={method}", override, "test=false")
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_wrong_name_that_is_handed_on_is_one_line_too():
    node = {"_target_": "svf_lightning.data.datamodule.own_images", "source": None, "fould": 3}
    with pytest.raises(ValueError, match=r"^data: .*unexpected keyword argument 'fould'"):
        build_object(node, "data")


def test_code_that_cannot_be_imported_is_named():
    with pytest.raises(ValueError, match=r"finetune: _target_ 'my_package.prepare' cannot be imported"):
        build_object({"_target_": "my_package.prepare"}, "finetune")


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.load",
        "builtins.eval",
        "svf_lightning.files.replace_file",
        "svf_lightning.data.prepare.prepare_pascal",
        "svf_lightning.data.emoji.json.loads",
        "svf_lightning.models.baseline.torch.load",
        "svf_lightning.training.checkpoints.torch.hub.load",
        "svf_lightningx.models.Evil",
        "svf_lightning.models.baseline.Baseline.forward",
        "svf_lightning.models.hsnet._HIDDEN",
        "svf_lightning.models.baseline",
        "svf_lightning.models.nothing.Here",
        "svf_lightning.models./etc/passwd.Here",
        "svf_lightning.training.base_learner.save_base",
        "svf_lightning.training.callbacks.RunCheckpoint",
        "svf_lightning.backbones.weights.download",
        ["svf_lightning.models.baseline.Baseline"],
        None,
        7,
    ],
)
def test_a_file_cannot_call_what_is_no_part_of_a_run(target):
    node = {"model": {"network": [{"deep": {"_target_": target}}]}}
    with pytest.raises(ValueError, match=r"some.yaml wants to call .* \(model.network.0.deep\)"):
        check_trust(node, "some.yaml")


@pytest.mark.parametrize("part", ["data", "backbone", "model", "finetune", "trainer"])
def test_every_part_of_the_main_job_is_trusted_and_instantiates(part, emoji_folder, tmp_path):
    from hydra.utils import instantiate

    from svf_lightning.runs.configuration import compose
    from tests.conftest import TINY

    config = compose([*TINY, f"data_dir={emoji_folder}"], tmp_path)
    check_trust(config[part], "config.yaml")
    built = instantiate(config[part])
    kinds = {"model": FewShotSegmenter, "trainer": Trainer}
    assert isinstance(built, kinds.get(part, object))


@pytest.mark.parametrize("group", ["data", "backbone", "model", "finetune", "trainer"])
def test_all_that_the_configuration_files_name_in_a_run_is_trusted(group):
    files = sorted((ROOT / "conf" / group).glob("*.yaml"))
    assert files
    for file in files:
        content = yaml.safe_load(file.read_text())
        check_trust({key: value for key, value in content.items() if key != "callbacks"}, str(file))


class Counting(Callback):
    """Somebody's own callback."""

    batches = 0

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, *_: object) -> None:
        Counting.batches += self.step


def test_callbacks_of_a_run_can_be_removed_changed_and_added(train, tmp_path):
    folder = train(
        tmp_path / "run",
        "~callbacks.pictures",
        "+callbacks.mine={_target_: tests.test_objects.Counting, step: 5}",
        "epochs=1",
        "data.test_episodes=2",
    )
    assert Counting.batches == 5 * 2
    assert (folder / "metrics.json").exists()
    assert not (folder / "episodes.png").exists()


def test_every_logger_gets_the_configuration_and_the_number_of_trained_values(train, tmp_path):
    folder = train(tmp_path / "run", "epochs=1", "test=false", "~logger.tensorboard", "model.lr=0.004")
    logged = yaml.safe_load((folder / "csv" / "hparams.yaml").read_text())
    assert logged["model"]["lr"] == 0.004
    assert logged["trainable"]["backbone"] == 11880  # of an EfficientNet-Lite0, stages 2 to 4


@pytest.mark.parametrize(("items", "batch", "batches", "expected"), [(10, 4, 3, 10), (10, 4, 2, 8)])
def test_progress_counts_items_from_the_loader_alone(items, batch, batches, expected):
    assert _count(DataLoader(TensorDataset(torch.zeros(items)), batch_size=batch), batches) == expected
    assert _count([torch.zeros(2)] * 3, batches) == float("inf")
    assert EpisodeProgress().unit == "episodes"
