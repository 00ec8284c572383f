import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from svf_lightning.data.episodes import EpisodeDataset
from svf_lightning.data.fss1000 import Fss1000, decode_mask
from svf_lightning.data.transforms import binary_mask
from tests.made_fss import make_fss

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.fixture
def made(tmp_path):
    return Fss1000(tmp_path / "fss"), make_fss(tmp_path / "fss")


def keep(image, mask, generator):
    return image, mask


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """As many classes as the real one, with images of 12 pixels."""
    root = tmp_path_factory.mktemp("fss") / "fss"
    lists = make_fss(root, train=180, val=40, test=60, side=12)
    return Fss1000(root), lists


def test_base_and_novel_classes_are_those_of_the_lists(made):
    source, lists = made
    names = sorted(name for classes in lists.values() for name in classes)

    for novel in ("test", "val"):
        base_ids, novel_ids = Fss1000(source.root, novel=novel).classes(0)
        assert {names[i - 1] for i in base_ids} == set(lists["trn"])
        assert {names[i - 1] for i in novel_ids} == set(lists[novel])
        assert not set(base_ids) & set(novel_ids)
        assert list(base_ids) == sorted(base_ids)


@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_are_cut_at_128_and_bear_the_class(made, split):
    source, _ = made
    index = source.index(split)

    assert len(index) == 100
    for i, name in enumerate(index.ids):
        title, number = name.split("/")
        image, label = index.read(i)
        class_id = source.class_names.index(title) + 1
        y, x = np.mgrid[:48, :48] - 24
        disc = x**2 + y**2 < (9 + int(number)) ** 2
        np.testing.assert_array_equal(label.numpy(), class_id * disc)
        assert image.shape == (3, 48, 48)
        assert index.pixels[i, [0, class_id]].tolist() == [(~disc).sum(), disc.sum()]
        assert index.pixels[i].sum() == 48 * 48


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_a_mask_may_have_any_mode(tmp_path, mode):
    grey = np.array([[0, 127, 128, 255]], np.uint8)
    Image.fromarray(grey).convert(mode).save(tmp_path / "mask.png")

    wanted = [[0, 0, 1, 1]] if mode != "1" else np.asarray(Image.fromarray(grey).convert("1")).tolist()
    assert decode_mask(tmp_path / "mask.png").tolist() == wanted


def test_no_class_has_the_id_that_means_ignored(whole):
    source, lists = whole
    base, novel = source.classes(0)
    names = sorted(name for classes in lists.values() for name in classes)

    assert len(names) == 280
    assert 255 not in base + novel
    assert max(base + novel) <= 281
    assert source.class_names[254] == ""
    assert {source.class_names[i - 1] for i in base} == set(lists["trn"])
    index = source.index("train")
    for number in (253, 254, 255, 279):
        i = index.ids.index(f"{names[number]}/10")
        class_id = source.class_names.index(names[number]) + 1
        mask = binary_mask(index.read(i)[1], class_id)
        assert set(mask.unique().tolist()) == {1}  # the disc is larger than the image


def test_a_test_begins_with_one_episode_of_every_class(whole):
    source, _ = whole
    _, novel = source.classes(0)
    dataset = EpisodeDataset(
        source.index("val"), novel, 5, keep, seed=0, fixed=True, min_pixels=source.min_pixels
    )

    assert len(dataset) == 600
    assert sorted(dataset.draw(0, i).class_id for i in range(60)) == sorted(novel)


def test_an_episode_shows_one_class(made):
    source, _ = made
    base, _ = source.classes(0)
    index = source.index("train")
    dataset = EpisodeDataset(index, base, 5, keep, seed=0, min_pixels=source.min_pixels, novel_images="drop")

    assert len(dataset) == 50
    query, class_id, supports = dataset.draw(0, 7)
    assert {index.ids[i].split("/")[0] for i in (query, *supports)} == {source.class_names[class_id - 1]}
    episode = dataset[0, 7]
    assert torch.equal(episode.query_mask, (index.read(query)[1] > 0).long())


def test_an_image_with_an_empty_mask_is_never_drawn(made):
    source, lists = made
    name = lists["test"][0]
    Image.new("L", (48, 48)).save(source.root / name / "3.png")
    index = source.index("val")
    dataset = EpisodeDataset(index, source.classes(0)[1], 1, keep, seed=0, min_pixels=source.min_pixels)

    assert index.ids.index(f"{name}/3") not in dataset.queries
    assert len(dataset) == 29


@pytest.mark.parametrize("fold", [1, -1, "0", None])
def test_it_has_one_split_only(made, fold):
    with pytest.raises(ValueError, match=r"fold is .*; fss1000 has one split only: use fold=0"):
        made[0].classes(fold)


def test_a_source_can_be_pickled_before_and_after_reading(made):
    source, _ = made
    before = pickle.loads(pickle.dumps(source)).class_names
    source.ensure()
    assert pickle.loads(pickle.dumps(source)).class_names == before


def test_missing_lists_say_where_they_are_from(made):
    source, _ = made
    (source.root / "splits/fss/val.txt").unlink()

    with pytest.raises(
        FileNotFoundError, match=r"no val.txt in .*splits/fss: fetch the lists .* HSNet"
    ) as caught:
        source.ensure()
    assert "fewshot_data.zip" not in str(caught.value)


def test_missing_everything_says_what_to_fetch(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no trn.txt, val.txt, test.txt in .*HSNet.*fewshot_data\.zip"
    ):
        Fss1000(tmp_path / "nowhere").ensure()


def test_a_root_that_is_too_high_is_answered_with_the_right_one(tmp_path):
    make_fss(tmp_path / "fewshot_data")

    with pytest.raises(FileNotFoundError, match=r"the data lies deeper: use root=.*fewshot_data$"):
        Fss1000(tmp_path).ensure()


def test_missing_folders_are_counted(made):
    source, lists = made
    for name in lists["trn"][:2]:
        (source.root / name).rename(source.root / f"away_{name}")

    with pytest.raises(
        FileNotFoundError, match=r"lacks the folders of 2 of 10 classes, class_.* for one: fetch"
    ):
        source.ensure()


def test_missing_and_broken_files_are_listed(made):
    source, lists = made
    name = lists["val"][0]
    (source.root / name / "4.png").unlink()
    (source.root / name / "5.jpg").write_bytes(b"")

    with pytest.raises(ValueError, match=rf"2 files cannot be used: .*{name}/4.png is missing.*{name}/5.jpg"):
        source.index("train")


def test_a_mask_of_another_size_is_named(made):
    source, lists = made
    Image.new("L", (30, 20)).save(source.root / lists["val"][0] / "4.png")

    with pytest.raises(ValueError, match=r"4.png is 30x20 but its image 4.jpg is 48x48"):
        source.index("val")


def test_a_class_in_two_lists_is_refused(made):
    source, lists = made
    with (source.root / "splits/fss/test.txt").open("a") as file:
        file.write(f"\n{lists['trn'][1]}\n")

    with pytest.raises(ValueError, match=rf"{lists['trn'][1]} stands in trn.txt and in test.txt"):
        source.ensure()


def test_an_empty_list_is_refused(made):
    (made[0].root / "splits/fss/trn.txt").write_text("\n")

    with pytest.raises(ValueError, match=r"trn.txt lists no classes"):
        made[0].classes(0)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="novel is 'trn'; FSS-1000 has test and val classes"):
        Fss1000("anywhere", novel="trn")
    with pytest.raises(ValueError, match="split is 'test'"):
        Fss1000("anywhere").index("test")


def test_the_hydra_group_builds_the_module_it_describes(made):
    source, lists = made
    run = {"fold": 0, "shot": 5, "seed": 7, "workers": 3, "data_dir": "somewhere", "selection": "last"}
    config = OmegaConf.merge(run, {"data": OmegaConf.load(CONF / "fss1000.yaml")})
    assert config.data.source.root == "somewhere/fss1000"
    config.data.source.root = str(source.root)
    data = instantiate(config.data, mean=(0.5,) * 3, std=(0.25,) * 3, _convert_="all")

    assert {data.source.class_names[i - 1] for i in data.roles.test} == set(lists["test"])
    assert (data.augment.size, data.test_episodes) == (225, 2400)
