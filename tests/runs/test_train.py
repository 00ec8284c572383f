"""The main job, as a user starts it, on the smallest data that has everything."""

import json
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

import evaluate
from svf_lightning.analysis import tables
from svf_lightning.runs.configuration import check_values
from svf_lightning.runs.run import build, build_part, load_run
from svf_lightning.training.checkpoints import load_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory, emoji_folder):
    """A finished tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        from tests.conftest import TINY
        from train import main

        folder = tmp_path_factory.mktemp("runs") / "svf"
        patch.setattr("sys.argv", ["train.py", *TINY, f"data_dir={emoji_folder}", f"hydra.run.dir={folder}"])
        main()
    return folder


def weights(folder):
    return load_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]


def test_a_run_leaves_its_scores_pictures_curves_and_all_that_is_needed_to_repeat_it(run):
    result = json.loads((run / "metrics.json").read_text())
    assert set(result["class_iou"]) == {"airplane", "bird", "boat", "bottle", "bus"}
    assert result["miou"] == pytest.approx(sum(result["class_iou"].values()) / 5)
    assert result["protocol"]["episodes"] == 6
    assert result["config"]["fold"] == 0
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert len(result["commit"]) == 40
    for name in ("episodes.png", "config.yaml", "csv/metrics.csv", "checkpoints/last.ckpt"):
        assert (run / name).stat().st_size > 0
    assert list(run.glob("tensorboard/events*"))


def test_only_singular_values_of_the_backbone_train(run, emoji_folder):
    config = json.loads((run / "metrics.json").read_text())["config"]
    segmenter, _ = build(config)
    build_part(config, "finetune")(segmenter.model.backbone)
    before, after = segmenter.model.backbone.state_dict(), weights(run)
    moved = {key for key, value in before.items() if not torch.equal(value, after[f"model.backbone.{key}"])}
    assert moved
    assert all(key.endswith(".s") and key.startswith(("layer2", "layer3", "layer4")) for key in moved)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_epochs_and_then_two_more_equal_four_bit_for_bit(train, tmp_path, workers):
    whole = train(tmp_path / "whole", "epochs=4", "test=false")
    parts = train(tmp_path / "parts", "epochs=4", "trainer.max_epochs=2", "test=false", f"workers={workers}")
    assert not all(
        torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(parts).values(), strict=True)
    )
    train(parts, "epochs=4", "resume=last", "test=false", f"workers={workers}")
    assert (parts / "csv" / "metrics-1.csv").exists()  # the curves of the first half are not lost
    ours, expected = weights(parts), weights(whole)
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(ours[key], value), key


def test_resuming_where_there_is_nothing_starts_afresh_and_says_so(train, tmp_path, capsys):
    train(tmp_path / "new", "resume=last", "epochs=1", "test=false")
    assert "no checkpoint to resume" in capsys.readouterr().out
    assert (tmp_path / "new" / "checkpoints" / "last.ckpt").exists()


def test_the_matcher_is_tested_without_any_training(call, emoji_folder, tmp_path):
    from tests.conftest import TINY
    from train import main

    tiny = [override for override in TINY if not override.startswith(("model.", "epochs"))]
    choice = [
        "model=matcher",
        "finetune=frozen",
        f"data_dir={emoji_folder}",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    call(main, *tiny, *choice)
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result["trainable"]["backbone"] == result["trainable"]["head"] == 0
    assert result["protocol"]["episodes"] == 6


def test_a_second_run_of_the_same_name_keeps_the_first(train, tmp_path):
    folder = train(tmp_path / "run", "epochs=1", "test=false")
    first = (folder / "checkpoints" / "last.ckpt").read_bytes()
    train(folder, "epochs=1", "test=false", "model.lr=0.1")
    assert (folder / "earlier" / "1" / "checkpoints" / "last.ckpt").read_bytes() == first
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() != first


def evaluation(call, run, *overrides):
    call(evaluate.main, f"run={run}", *overrides)
    return json.loads((run / "evaluation.json").read_text())


def test_neither_workers_nor_batch_size_change_the_score(call, run):
    alone = evaluation(call, run, "batch_size=1", "workers=0", "episodes=7")
    together = evaluation(call, run, "batch_size=3", "workers=2", "episodes=7")
    assert alone["seeds"][0]["class_iou"] == together["seeds"][0]["class_iou"]


def test_evaluating_again_gives_the_score_of_the_run(call, run):
    tested = json.loads((run / "metrics.json").read_text())
    assert evaluation(call, run)["seeds"][0]["class_iou"] == tested["class_iou"]


def test_several_seeds_give_their_mean_and_deviation(call, run):
    result = evaluation(call, run, "seeds=[0,1,2]", "episodes=4")
    mious = torch.tensor([row["miou"] for row in result["seeds"]], dtype=torch.float64)
    assert result["miou_mean"] == pytest.approx(mious.mean().item())
    assert result["miou_std"] == pytest.approx(mious.std(correction=0).item())


def test_saved_episodes_read_again_give_the_same_test_and_no_result_is_lost(call, run, tmp_path):
    path = tmp_path / "list.jsonl"
    drawn = evaluation(call, run, "seeds=[3,4]", "episodes=5", f"save_episodes={path}")
    listed = evaluation(call, run, f"episode_list={path}")
    assert listed["protocol"]["digests"] == drawn["protocol"]["digests"]
    assert listed["protocol"]["seeds"] == [3, 4]
    assert [row["class_iou"] for row in listed["seeds"]] == [row["class_iou"] for row in drawn["seeds"]]
    assert drawn in [json.loads(p.read_text()) for p in run.glob("evaluation-*.json")]


def test_a_data_set_that_has_moved_is_found_by_its_new_root(call, run, emoji_folder, tmp_path):
    before = evaluation(call, run, "episodes=4")
    (tmp_path / "moved").symlink_to(emoji_folder / "emoji")
    there = evaluation(call, run, "episodes=4", f"root={tmp_path / 'moved'}")
    assert there["seeds"][0]["class_iou"] == before["seeds"][0]["class_iou"]


def test_a_run_with_one_shot_is_tested_with_two(call, run):
    assert evaluation(call, run, "shot=2", "episodes=3")["protocol"]["shot"] == 2


def test_the_number_of_listed_episodes_is_the_lists_own(call, run, capsys):
    with pytest.raises(SystemExit):
        call(evaluate.main, f"run={run}", "episode_list=some.jsonl", "episodes=5")
    assert "episodes=5 cannot be had from some.jsonl" in capsys.readouterr().err


def test_a_checkpoint_chosen_on_base_classes_never_met_them_in_training(train, tmp_path):
    often = "trainer.check_val_every_n_epoch=1"
    folder = train(tmp_path / "run", "selection=base", "data.novel_images=background", often)
    protocol = json.loads((folder / "metrics.json").read_text())["protocol"]
    assert protocol["selection"] == "base"
    assert (folder / "checkpoints" / "best.ckpt").is_file()


def test_a_checkpoint_chosen_on_validation_is_the_one_that_is_tested(train, tmp_path):
    folder = train(tmp_path / "run", "selection=novel", "trainer.check_val_every_n_epoch=1")
    _, segmenter = load_run(folder)
    best = load_checkpoint(folder / "checkpoints" / "best.ckpt")["state_dict"]
    assert all(torch.equal(value, best[key]) for key, value in segmenter.state_dict().items())


def test_the_report_has_a_row_per_strategy_and_a_mean_only_over_all_folds():
    def result(finetune, fold, miou):
        identity = {"data": "emoji", "model": "baseline", "backbone": "x", "shot": 1}
        return {"identity": {**identity, "finetune": finetune, "fold": fold}, "miou": miou}

    results = [result("svf", 0, 0.5), result("svf", 1, 0.7), result("frozen", 0, 0.4)]
    [(title, table)] = tables.report(results)
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert cells == [
        ("baseline", "frozen", "", "40.00", "", ""),
        ("baseline", "svf", "", "50.00", "70.00", "60.00"),
    ]
    assert title == "emoji, x, 1 shot: novel-class mIoU %"


def test_runs_of_different_protocols_stand_in_different_tables(run):
    result = json.loads((run / "metrics.json").read_text())
    other = {**result, "protocol": {**result["protocol"], "episodes": 5000}}
    [(_, table)] = tables.report([result, result])
    titles = [title for title, _ in tables.report([result, other])]
    assert table.row_count == 1
    assert [("6 episodes" in title, "5000 episodes" in title) for title in titles] == [
        (False, True),
        (True, False),
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fold=4", "fold is 4; emoji has folds 0, 1, 2 and 3"),
        ("shot=0", "shot must be a whole number of 1 or more, got 0"),
        ("shot=30", "shot=30 needs 31"),
        ("selection=best", "selection must be one of 'novel', 'base', 'last', got 'best'"),
        ("nonsense=1", "Could not override 'nonsense'"),
        ("model.learning_rate=1", "Could not override 'model.learning_rate'"),
        ("finetune=svd", "Available options in 'finetune'"),
        ("finetune.stages=[layer7]", "layer7"),
        ("model.optimizer=lion", "optimizer must be 'sgd' or 'adamw', got 'lion'"),
        ("model.schedule=linear", "schedule must be 'cosine', 'poly' or 'constant'"),
        ("model.network.shot_reduction=max", "shot_reduction must be 'sum' or 'mean', got 'max'"),
        ("backbone.weights=no.pth", "no.pth"),
        ("resume=no.ckpt", "no checkpoint at no.ckpt"),
        ("data.novel_images=keep", "novel_images='keep'"),
        ("data.batch_size=50", "batch_size=50 is more than the 8 training episodes"),
    ],
)
def test_a_wrong_value_ends_in_one_line_that_names_it(override, message, train, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "run", override)
    assert ended.value.code == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fold=1", "fold is 0 in the run and 1 now"),
        ("backbone=timm", "backbone is 'efficientnet_lite0' in the run and 'resnet18' now"),
        ("finetune=frozen", "finetune is 'svf' in the run and 'frozen' now"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(
    override, message, run, train, tmp_path, capsys
):
    more = ["backbone.name=resnet18", "backbone.weights=null"] if override == "backbone=timm" else []
    with pytest.raises(SystemExit):
        train(tmp_path / "run", f"resume={run}/checkpoints/last.ckpt", override, *more)
    assert message in capsys.readouterr().err


def test_a_truncated_checkpoint_is_refused_by_name(run, train, tmp_path, capsys):
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes((run / "checkpoints" / "last.ckpt").read_bytes()[:5000])
    with pytest.raises(SystemExit):
        train(tmp_path / "run", f"resume={broken}")
    assert "broken.ckpt cannot be read as a checkpoint" in capsys.readouterr().err


def test_distributed_training_inside_a_sweep_is_refused():
    config = {"selection": "last", "shot": 1, "trainer": {"strategy": "ddp"}}
    with pytest.raises(ValueError, match="cannot run under -m"):
        check_values(config, multirun=True)


class Looking(Callback):
    """Look into the run's folder while it trains."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = self.folder / "last.ckpt"
        steps.append(load_checkpoint(last)["global_step"] if last.exists() else None)


steps: list[int | None] = []


@pytest.mark.parametrize("selection", ["last", "novel"])
def test_the_last_whole_epoch_is_on_disk_while_the_next_one_runs(train, tmp_path, selection):
    steps.clear()
    looking = f"{{_target_: tests.runs.test_train.Looking, folder: {tmp_path}/run/checkpoints}}"
    train(
        tmp_path / "run",
        f"+callbacks.looking={looking}",
        "epochs=3",
        f"selection={selection}",
        "test=false",
    )
    assert steps == [None, 2, 4]
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 6
    assert not list((tmp_path / "run" / "checkpoints").glob("*.part"))


def test_a_result_of_fewer_episodes_than_its_protocol_says_so_and_stays_out_of_tables(
    train, call, tmp_path, capsys
):
    options = ["data.test_batch_size=2", "epochs=1"]
    folder = train(tmp_path / "part", "+trainer.limit_test_batches=2", *options)
    result = json.loads((folder / "metrics.json").read_text())
    assert (result["scored"], result["protocol"]["episodes"], result["partial"]) == (4, 6, True)
    train(tmp_path / "whole", *options)
    (row,) = tables.read_results(tmp_path)
    assert (row["run"], row["scored"]) == ("whole", 6)
    assert "partial" not in row
    assert "part/metrics.json is left out: only 4 of 6 test episodes were scored" in capsys.readouterr().out

    call(evaluate.main, f"run={folder}")
    assert "partial" in json.loads((folder / "evaluation.json").read_text())  # the trainer is the run's own


def test_a_dry_run_writes_no_result(train, tmp_path, capsys):
    folder = train(tmp_path / "dry", "+trainer.fast_dev_run=true")
    assert "no result is written" in capsys.readouterr().out
    assert not (folder / "metrics.json").exists()
    assert not (folder / "checkpoints" / "last.ckpt").exists()
