"""Which episodes each stage gets, and that Lightning and Hydra can drive it."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from svf_lightning.data.datamodule import FewShotDataModule
from svf_lightning.data.emoji import Emoji
from svf_lightning.data.pascal import Pascal
from svf_lightning.episode import Episode
from tests.scenes import Scenes

CONF = Path(__file__).parents[2] / "conf" / "data"
GREY = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def data_module(stage=None, **changes):
    options = {"fold": 1, "shot": 1, "image_size": 33, "batch_size": 4, **GREY, "val_episodes": 6, **changes}
    data = FewShotDataModule(Scenes(), **options)
    data.prepare_data()
    if stage:
        data.setup(stage)
    return data


def test_training_takes_base_classes_and_evaluation_novel_ones():
    data = data_module("fit", novel_images="background", test_episodes=40)
    data.setup("test")

    assert set(data.train_set.members) == {1, 2, 5, 6}
    assert set(data.val_set.members) == set(data.test_set.members) == {3, 4}
    trained = torch.cat([batch.class_id for batch in data.train_dataloader()])
    tested = torch.cat([episode.class_id for episode, _ in data.test_dataloader()])
    assert set(trained.tolist()) == {1, 2, 5, 6}
    assert set(tested.tolist()) == {3, 4}


def test_novel_objects_leave_training_or_become_background():
    index = Scenes().index("train")
    dropping, keeping = (data_module("fit", novel_images=rule).train_set for rule in ("drop", "background"))

    assert not index.pixels[dropping.queries][:, [3, 4]].any()
    assert index.pixels[keeping.queries][:, [3, 4]].any()
    position = next(p for p, i in enumerate(keeping.queries) if index.pixels[i, [3, 4]].any())
    _, label = index.read(keeping.queries[position])
    keeping.transform = lambda image, mask, generator: (image, mask)
    assert keeping[position].query_mask[(label == 3) | (label == 4)].eq(0).all()


def test_setup_builds_what_its_stage_needs():
    built = {
        stage: {name for name in ("train_set", "val_set", "test_set") if hasattr(data_module(stage), name)}
        for stage in ("fit", "validate", "test")
    }

    assert built == {"fit": {"train_set", "val_set"}, "validate": {"val_set"}, "test": {"test_set"}}


def test_training_batches_are_full_and_shuffled_anew_every_epoch():
    data = data_module("fit", novel_images="background")
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        epochs.append([batch.query_id.tolist() for batch in loader])

    queries = len(data.train_set)
    assert queries % 4  # else nothing is left out
    assert [len(batch) for batch in epochs[0]] == [4] * (queries // 4)
    assert epochs[0] != epochs[1]


def test_validation_is_the_beginning_of_the_test_whatever_the_batch_size():
    data, batched = data_module("fit"), data_module("test", test_episodes=9, test_batch_size=4)
    validation = [episode for episode, _ in data.val_dataloader()]
    test = [episode for episode, _ in batched.test_dataloader()]

    assert [len(e.query_id) for e in test] == [4, 4, 1]
    for field, name in enumerate(Episode._fields):
        one, other = (torch.cat([e[field] for e in batches])[:6] for batches in (validation, test))
        assert torch.equal(one, other), name


def test_evaluation_batches_carry_masks_at_original_resolution():
    data = data_module("validate", test_batch_size=6)

    [(episode, originals)] = data.val_dataloader()

    labels = [data.val_set.index.read(i)[1] for i in episode.query_id.tolist()]
    assert [o.shape for o in originals] == [label.shape for label in labels]
    for original, label, class_id in zip(originals, labels, episode.class_id, strict=True):
        assert torch.equal(original == 1, label == class_id)
        assert torch.equal(original == 255, label == 255)


def test_workers_outlive_an_epoch_and_change_nothing():
    one, many = (
        data_module("fit", workers=0).train_dataloader(),
        data_module("fit", workers=2).train_dataloader(),
    )
    assert many.persistent_workers
    assert not one.persistent_workers
    for epoch in (0, 1):
        for loader in (one, many):
            loader.sampler.set_epoch(epoch)
        for batch, same in zip(one, many, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, same, strict=True))


class Listener(pl.LightningModule):
    """Learns nothing; writes down the episodes that arrive."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = {"train": [], "val": []}

    def training_step(self, episode, batch_idx):
        self.seen["train"].append(
            (self.current_epoch, episode.query_id.tolist(), episode.support_ids.tolist())
        )
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        episode, _ = batch
        self.seen["val"].append((episode.query_id.tolist(), episode.support_ids.tolist()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_gives_every_epoch_its_own_draws_and_validation_always_the_same(tmp_path):
    data, listener = data_module(episodes_per_epoch=8, novel_images="background"), Listener()
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )

    trainer.fit(listener, datamodule=data)

    train, val = listener.seen["train"], listener.seen["val"]
    assert [epoch for epoch, _, _ in train] == [0, 0, 1, 1, 2, 2]
    queries = [query for _, batch, _ in train for query in batch]
    assert len(set(queries)) == 24  # of 8 + 8 + 8 none twice: the epochs go on where the last one stopped
    assert len(val) == 18
    assert val[:6] == val[6:12] == val[12:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 500}, "batch_size=500 is more than the [0-9]+ training episodes"),
        ({"episodes_per_epoch": 3}, "batch_size=4 is more than the 3 training episodes"),
        (
            {"augment": {"rotatee": 5}},
            "augment has no setting rotatee; it has blur_p, crop_foreground, flip_p",
        ),
        ({"letterbox": {"size": 5}}, "letterbox has no setting size; it has multiple, pad"),
        ({"image_size": 4}, "size=4 is too small"),
        ({"shot": 40}, "shot=40 needs 41"),
        ({"val_episodes": 0}, "0 episodes"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        data_module("fit", **changes).train_dataloader()


@pytest.mark.parametrize(
    ("name", "source", "size", "episodes"), [("emoji", Emoji, 129, 500), ("pascal", Pascal, 473, 1000)]
)
def test_the_hydra_group_builds_the_module_it_describes(name, source, size, episodes):
    run = {"fold": 2, "shot": 5, "seed": 7, "workers": 3, "data_dir": "somewhere", "selection": "last"}
    config = OmegaConf.merge(run, {"data": OmegaConf.load(CONF / f"{name}.yaml")})

    data = instantiate(config.data, **GREY, _convert_="all")

    assert isinstance(data.source, source)
    assert str(data.source.root).startswith("somewhere/")
    assert data.roles.test == (11, 12, 13, 14, 15)
    assert (data.shot, data.seed, data.workers, data.test_episodes) == (5, 7, 3, episodes)
    assert data.augment.size == data.letterbox.size == size
    assert data.novel_images == "drop"
