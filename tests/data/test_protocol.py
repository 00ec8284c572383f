"""What a score was measured on, lists of episodes, and the classes that choose a checkpoint."""

import json

import pytest
import torch

from svf_lightning.data.datamodule import FewShotDataModule
from svf_lightning.data.episode_list import read_episode_list, seeds_of, write_list
from svf_lightning.data.episodes import class_lists
from svf_lightning.data.folds import class_roles, split_classes
from svf_lightning.data.protocol import describe, digest, episode_rows
from tests.scenes import Scenes

OPTIONS = {"image_size": 33, "batch_size": 4, "mean": (0.5,) * 3, "std": (0.25,) * 3, "val_episodes": 30}


def evaluation(**changes):
    data = FewShotDataModule(Scenes(), **{"fold": 1, "shot": 2, "test_episodes": 9, **OPTIONS, **changes})
    data.setup("test")
    return data


def training(**changes):
    data = FewShotDataModule(Scenes(), **{"fold": 1, "shot": 1, **OPTIONS, **changes})
    data.setup("fit")
    return data


# -- classes that choose the checkpoint


@pytest.mark.parametrize(("dataset", "count"), [("pascal", 3), ("coco", 12), ("emoji", 3)])
@pytest.mark.parametrize("fold", range(4))
def test_a_fifth_of_the_base_classes_validates_and_no_class_has_two_roles(dataset, count, fold):
    base, novel = split_classes(dataset, fold)
    roles = class_roles(base, novel, "base")
    assert len(roles.validation) == count
    assert sorted(roles.train + roles.validation) == list(base)
    assert roles.test == novel


@pytest.mark.parametrize("selection", ["novel", "last"])
def test_the_fields_habit_trains_on_all_base_classes_and_validates_on_novel_ones(selection):
    base, novel = split_classes("pascal", 2)
    assert class_roles(base, novel, selection) == (base, novel, novel)


def test_two_base_classes_are_enough_to_keep_one_out():
    assert class_roles((3, 7), (1,), "base") == ((3,), (7,), (1,))
    with pytest.raises(ValueError, match="only one base class; use selection=last"):
        class_roles((3,), (1,), "base")


@pytest.mark.parametrize("novel_images", ["drop", "background"])
def test_choosing_on_base_classes_looks_at_no_novel_class_no_test_image_and_no_training_image(novel_images):
    data = training(selection="base", novel_images=novel_images)
    index = Scenes().index("train")
    validated = {data.val_set.draw(0, i) for i in range(len(data.val_set))}
    images = {image for draw in validated for image in (draw.query, *draw.supports)}

    assert {draw.class_id for draw in validated} == set(data.roles.validation) == {5}
    assert set(data.train_set.members) == {1, 2, 6}
    assert data.val_set.index.ids == index.ids  # of the training images, not of those that test
    assert not images & set(data.train_set.queries.tolist())
    assert not index.pixels[data.train_set.queries][:, list(data.roles.validation)].any()


def test_hidden_classes_leave_training_where_other_novel_objects_may_stay():
    pixels = Scenes().index("train").pixels
    kept = class_lists(pixels, [1, 2], min_pixels=1, novel_images="background")
    hiding = class_lists(pixels, [1, 2], min_pixels=1, novel_images="background", hidden=[5])
    assert (hiding == kept & (pixels[:, 5] == 0)[:, None]).all()
    assert pixels[hiding.any(axis=1)][:, [3, 4]].any()


# -- the protocol


def test_a_protocol_says_what_was_tested():
    protocol = evaluation(selection="last", episode_seed=7).protocol().as_dict()
    assert protocol["novel_classes"] == ("cat", "dog")
    assert (protocol["fold"], protocol["shot"], protocol["episodes"], protocol["seeds"]) == (1, 2, 9, (7,))
    assert protocol["novel_images"] == "drop"
    assert json.loads(json.dumps(protocol))["digests"] == list(protocol["digests"])
    line = describe(protocol)
    assert "scenes (made up), 2 shot, 9 episodes of seed 7, 33 pixels (multiples of 8) on black" in line
    assert line.endswith("last weights, nothing chosen")


def test_equal_digests_mean_equal_episodes_whatever_the_training_seed_and_batch_size():
    one = evaluation(seed=1, test_batch_size=1).protocol().digests
    assert evaluation(seed=2, test_batch_size=4).protocol().digests == one
    assert evaluation(episode_seed=1).protocol().digests != one
    assert evaluation(test_episodes=8).protocol().digests != one
    assert evaluation(shot=1).protocol().digests != one


# -- episode lists


def written(path, *seeds, **changes):
    rows = {seed: episode_rows(evaluation(episode_seed=seed, **changes).test_set) for seed in seeds}
    write_list(path, evaluation(**changes).protocol(), rows)
    return path


def test_a_list_gives_the_episodes_that_it_was_written_from_pixel_for_pixel(tmp_path):
    path = written(tmp_path / "list.jsonl", 3, 4)
    assert seeds_of(path) == [3, 4]
    drawn = evaluation(episode_seed=4)
    listed = evaluation(episode_seed=4, episode_list=path, test_episodes=500)
    assert listed.test_episodes == len(listed.test_set) == 9
    assert listed.protocol().digests == drawn.protocol().digests
    for (one, _), (other, _) in zip(drawn.test_dataloader(), listed.test_dataloader(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_list_is_readable_names_and_changing_one_changes_the_digest(tmp_path):
    path = written(tmp_path / "list.jsonl", 0)
    header, first, *rest = path.read_text().splitlines()
    row = json.loads(first)
    assert json.loads(header)["data"] == "scenes"
    assert row["class"] in ("cat", "dog")
    assert len({row["query"], *row["supports"]}) == 3
    row["supports"] = row["supports"][::-1]
    path.write_text("\n".join([header, json.dumps(row), *rest]))
    assert digest(evaluation(episode_list=path).test_set) != evaluation().protocol().digests[0]


VAL = Scenes().index("val")
BLANK = VAL.ids[int((VAL.pixels[:, 3:5].sum(axis=1) == 0).argmax())]  # shows no class under test


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class": "ant"}, "line 2: 'ant' is no class under test in fold 1"),
        ({"query": "scene99"}, "line 2: scenes has no test image 'scene99'"),
        ({"supports": ["scene1"]}, "a query and 2 other image"),
        ({"supports": ["scene1", "scene1"]}, "all distinct"),
        ({"query": BLANK}, f"'{BLANK}' shows no"),
        ({"seed": "0"}, "line 2, is not part of an episode list"),
        ({"seed": 5}, "no episodes of seed 0; it has those of"),
        ({"supports": "scene1"}, "line 2, is not part"),
    ],
)
def test_a_line_that_is_no_episode_here_is_refused_by_its_number(changes, message, tmp_path):
    path = tmp_path / "list.jsonl"
    header, first, *_ = written(path, 0).read_text().splitlines()
    path.write_text(header + "\n" + json.dumps({**json.loads(first), **changes}) + "\n")
    with pytest.raises(ValueError, match=message):
        evaluation(episode_list=path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fold": 0}, "lists episodes of fold=1, this test has fold=0"),
        ({"shot": 1}, "lists episodes of shot=2, this test has shot=1"),
    ],
)
def test_a_list_of_another_test_is_refused(changes, message, tmp_path):
    path = written(tmp_path / "list.jsonl", 0)
    with pytest.raises(ValueError, match=message):
        evaluation(episode_list=path, **changes)


def test_a_file_that_is_no_list_or_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="save_episodes=FILE"):
        evaluation(episode_list=tmp_path / "none.jsonl")
    for content in ("", "2007_000033\n", '{"episode_list": 99}\n'):
        (tmp_path / "other.txt").write_text(content)
        with pytest.raises(ValueError, match=r"other\.txt"):
            evaluation(episode_list=tmp_path / "other.txt")


def test_a_list_without_episodes_is_refused(tmp_path):
    path = written(tmp_path / "list.jsonl", 0)
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="lists no episodes"):
        seeds_of(path)


def test_a_list_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = written(tmp_path / "list.jsonl", 0)
    before = path.read_bytes()

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space left"):
        written(path, 1)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_list_read_alone_names_positions_and_classes_of_the_index(tmp_path):
    path = written(tmp_path / "list.jsonl", 0)
    index = Scenes().index("val")
    draws = read_episode_list(path, index, (3, 4), seed=0, edition="made up", fold=1, shot=2)
    assert draws == [evaluation().test_set.draw(0, i) for i in range(9)]
