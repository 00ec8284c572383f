"""The rules of the episode protocol, on index tables made by hand, and how draws depend on their keys."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from torch import distributed
from torch.utils.data import DataLoader

from svf_lightning.data.episodes import EpisodeDataset, EpochSampler, class_lists, collate
from svf_lightning.data.transforms import Augment, Letterbox
from tests.scenes import index_of, mixed

GREY = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
AUGMENT = Augment(33, **GREY)
LETTERBOX = Letterbox(33, **GREY)


def episodes(scenes=None, classes=(1, 2, 3, 4, 5, 6), shot=1, **changes):
    options = {"transform": AUGMENT, "seed": 0, "min_pixels": 100, **changes}
    return EpisodeDataset(index_of(mixed(60) if scenes is None else scenes), classes, shot, **options)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Which images stand in which list


def test_the_size_rule_counts_2048_as_enough_and_2047_as_too_few():
    pixels = np.array([[0, 2048, 0], [0, 2047, 0], [0, 0, 5000]])

    listed = class_lists(pixels, [1, 2], min_pixels=2048, novel_images="background")

    assert listed.tolist() == [[True, False], [False, False], [False, True]]


def test_one_pixel_of_a_novel_class_drops_a_training_image_from_every_list():
    pixels = np.array([[0, 5000, 5000, 1], [0, 5000, 5000, 0], [0, 5000, 0, 9000]])

    dropped = class_lists(pixels, [1, 2], min_pixels=2048, novel_images="drop")
    kept = class_lists(pixels, [1, 2], min_pixels=2048, novel_images="background")

    assert dropped.tolist() == [[False, False], [True, True], [False, False]]
    assert kept.tolist() == [[True, True], [True, True], [True, False]]


def test_a_dropped_image_is_neither_query_nor_support():
    scenes = [{1: 300}, {1: 300, 3: 1}, {1: 300}, {2: 300}, {2: 300}, {2: 300, 4: 9}]
    train = episodes(scenes, classes=(1, 2), novel_images="drop")

    drawn = {image for epoch in range(20) for i in range(4) for d in [train.draw(epoch, i)]
             for image in (d.query, *d.supports)}  # fmt: skip

    assert train.queries.tolist() == [0, 2, 3, 4]
    assert drawn == {0, 2, 3, 4}


def test_queries_keep_the_order_of_the_index():
    scenes = [{2: 300}, {1: 20}, {1: 300}, {3: 300}, {1: 300, 2: 300}]

    assert episodes(scenes, classes=(1, 2)).queries.tolist() == [0, 2, 4]


def test_a_class_too_small_for_its_list_may_still_be_the_class_of_a_query():
    small = {1: 300, 2: 5}  # listed under 1 only, but it shows 2
    train = episodes([small, {1: 300}, {2: 300}, {2: 300}], classes=(1, 2))

    of_small = [train.draw(epoch, 0) for epoch in range(50)]
    others = [train.draw(epoch, i) for epoch in range(50) for i in (1, 2, 3)]

    assert {d.class_id for d in of_small} == {1, 2}
    assert all(0 not in d.supports for d in others if d.class_id == 2)


# What is drawn


@pytest.mark.parametrize("shot", [1, 5])
@pytest.mark.parametrize("fixed", [False, True])
def test_supports_are_distinct_images_of_the_class_and_never_the_query(shot, fixed):
    data = episodes(shot=shot, fixed=fixed, length=300)

    for i in range(300):
        query, class_id, supports = data.draw(0, i)
        assert len(set(supports)) == shot
        assert query not in supports
        assert data.index.pixels[query, class_id] > 0
        assert (data.index.pixels[list(supports), class_id] >= 100).all()


def test_all_images_but_the_query_are_supports_when_the_class_has_just_enough():
    train = episodes([{1: 300}] * 6, classes=(1,), shot=5)

    assert all({*train.draw(0, i).supports} == {*range(6)} - {i} for i in range(6))


def test_class_and_support_are_uniform():
    train = episodes([{1: 300, 2: 100, 3: 700}] * 5, classes=(1, 2, 3))

    drawn = [train.draw(epoch, 0) for epoch in range(1200)]

    # a share of 1/3 or 1/4 of 1200 strays by 5 standard deviations once in a million
    assert all(abs(n - 400) < 82 for n in Counter(d.class_id for d in drawn).values())
    supports = Counter(d.supports[0] for d in drawn)
    assert set(supports) == {1, 2, 3, 4}
    assert all(abs(n - 300) < 75 for n in supports.values())


def test_fixed_episodes_walk_the_queries_in_order_pass_after_pass():
    test = episodes(classes=(1, 2), fixed=True, length=1000)
    count = len(test.queries)

    drawn = [test.draw(0, i) for i in range(3 * count)]

    assert [d.query for d in drawn] == 3 * test.queries.tolist()
    assert drawn[:count] != drawn[count : 2 * count]  # other classes and supports


def test_a_longer_test_begins_with_the_episodes_of_a_shorter_one():
    short, long = (episodes(fixed=True, length=length, transform=LETTERBOX) for length in (10, 200))

    for i in range(10):
        (episode, original), (again, original_again) = short[i], long[i]
        assert same(episode, again)
        assert torch.equal(original, original_again)


def test_fixed_episodes_are_the_same_in_every_epoch():
    test = episodes(fixed=True, length=50, transform=LETTERBOX)

    assert same(test[0, 7][0], test[9, 7][0])
    assert same(test[0, 7][0], test[7][0])


def test_the_same_seed_epoch_and_position_give_the_same_episode_bit_for_bit():
    assert same(episodes(shot=2)[3, 5], episodes(shot=2)[3, 5])


@pytest.mark.parametrize("changes", [{"epoch": 4}, {"seed": 1}])
def test_another_epoch_or_seed_draws_and_augments_anew(changes):
    data, other = episodes(), episodes(seed=changes.get("seed", 0))
    epoch = changes.get("epoch", 3)

    assert [data.draw(3, i) for i in range(30)] != [other.draw(epoch, i) for i in range(30)]
    assert data[3, 5].query_id == other[epoch, 5].query_id
    assert not torch.equal(data[3, 5].query_image, other[epoch, 5].query_image)


def test_a_training_epoch_does_not_repeat_the_fixed_draws():
    train, fixed = episodes(), episodes(fixed=True)

    for epoch in range(3):
        assert [train.draw(epoch, i) for i in range(30)] != [fixed.draw(0, i) for i in range(30)]


def test_query_and_supports_are_augmented_independently():
    scenes = [{1: 900}] * 3
    data = episodes(scenes, classes=(1,), shot=2)

    episode = data[0, 0]

    # The three labels are alike (up to a row), so equal masks would mean equal augmentations
    masks = [episode.query_mask, *episode.support_masks]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


# What an episode is


def test_an_episode_holds_what_was_drawn():
    test = episodes(shot=2, fixed=True, transform=LETTERBOX)
    query, class_id, supports = test.draw(0, 8)
    episode, original = test[8]

    def expected(position):
        image, label = test.index.read(position)
        mask = torch.zeros_like(label)
        mask[label == class_id] = 1
        mask[label == 255] = 255
        image, small = LETTERBOX(image, mask)
        return image, small.long(), mask

    image, mask, raw = expected(query)
    assert torch.equal(episode.query_image, image)
    assert torch.equal(episode.query_mask, mask)
    assert torch.equal(original, raw)
    for k, position in enumerate(supports):
        image, mask, _ = expected(position)
        assert torch.equal(episode.support_images[k], image)
        assert torch.equal(episode.support_masks[k], mask)
    assert (episode.class_id, episode.query_id) == (class_id, query)
    assert episode.support_ids.tolist() == list(supports)


def test_shapes_and_types_are_those_of_episode():
    episode = next(iter(DataLoader(episodes(shot=3), batch_size=4)))

    assert {name: tuple(value.shape) for name, value in episode._asdict().items()} == {
        "query_image": (4, 3, 33, 33),
        "query_mask": (4, 33, 33),
        "support_images": (4, 3, 3, 33, 33),
        "support_masks": (4, 3, 33, 33),
        "class_id": (4,),
        "query_id": (4,),
        "support_ids": (4, 3),
    }
    assert episode.query_image.dtype == episode.support_images.dtype == torch.float32
    assert all(value.dtype == torch.long for value in episode if not value.is_floating_point())
    assert set(episode.query_mask.unique().tolist()) <= {0, 1, 255}


def test_collate_keeps_masks_at_their_own_sizes():
    test = episodes(fixed=True, transform=LETTERBOX)
    samples = [test[i] for i in range(3)]

    episode, originals = collate(samples)

    assert same(episode, [torch.stack(values) for values in zip(*(e for e, _ in samples), strict=True)])
    assert [o.shape for o in originals] == [test.index.read(i)[1].shape for i in test.queries[:3]]
    assert len({o.shape for o in originals}) > 1


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 3), (2, 1), (2, 3)])
def test_workers_and_batch_size_change_no_episode(workers, batch_size):
    def load(workers, batch_size):
        train = episodes(shot=2)
        loader = DataLoader(train, batch_size, sampler=EpochSampler(12, seed=0), num_workers=workers)
        return [torch.cat(values) for values in zip(*loader, strict=True)]

    assert same(load(0, 1), load(workers, batch_size))


# The order of an epoch


def test_an_epoch_visits_every_query_once_in_an_order_of_its_own():
    sampler = EpochSampler(20, seed=0)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        pairs = list(sampler)
        assert {e for e, _ in pairs} == {epoch}
        orders.append([i for _, i in pairs])

    assert all(sorted(order) == list(range(20)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    sampler.set_epoch(1)
    assert [i for _, i in sampler] == orders[1]
    assert [i for _, i in EpochSampler(20, seed=1)] != orders[0]


@pytest.mark.parametrize("count", [8, 20, 33])
def test_epochs_of_any_length_use_all_queries_equally_and_never_repeat_a_draw(count):
    sampler = EpochSampler(20, seed=0, episodes=count)
    pairs = []
    for epoch in range(20):
        sampler.set_epoch(epoch)
        assert len(sampler) == count
        pairs += sampler

    assert len(set(pairs)) == len(pairs) == 20 * count
    assert set(Counter(i for _, i in pairs).values()) == {count}


def test_ranks_share_an_epoch_equally_without_overlap():
    shares = [list(EpochSampler(22, seed=0, rank=rank, num_replicas=4)) for rank in range(4)]

    assert [len(share) for share in shares] == [5, 5, 5, 5]  # a rank with one more would wait for ever
    assert len({pair for share in shares for pair in share}) == 20
    assert {pair for share in shares for pair in share} < set(EpochSampler(22, seed=0))


def test_ranks_run_every_fixed_episode_once():
    shares = [EpochSampler(22, seed=0, shuffle=False, rank=r, num_replicas=4) for r in range(4)]

    assert [len(share) for share in shares] == [6, 6, 5, 5]
    assert sorted(i for share in shares for _, i in share) == list(range(22))
    assert [i for _, i in shares[1]] == [1, 5, 9, 13, 17, 21]


def test_the_sampler_asks_for_its_rank_when_it_is_used_not_when_it_is_made(monkeypatch):
    sampler = EpochSampler(10, seed=0, shuffle=False)
    assert len(sampler) == 10
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: 2)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 5)

    assert [i for _, i in sampler] == [2, 7]


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shot": 0}, "shot=0"),
        ({"seed": -1}, "seed=-1 is negative"),
        ({"length": 0}, "0 episodes"),
        ({"novel_images": "keep"}, "novel_images='keep'.*'drop' or 'background'"),
        ({"min_pixels": 10**6}, "scenes: none of 60 images can be a query.*1000000 pixels"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        episodes(**changes)


def test_a_class_with_too_few_images_is_named_with_what_it_needs():
    scenes = [{1: 300}] * 6 + [{2: 300}] * 5 + [{2: 99}]

    with pytest.raises(
        ValueError, match=r"class 2 \(bee\) has 5 images with.*100 pixels.*shot=5 needs 6.*lower shot"
    ):
        episodes(scenes, classes=(1, 2), shot=5)
    assert len(episodes(scenes, classes=(1, 2), shot=4)) == 11


def test_a_loop_over_episodes_ends():
    assert len(list(episodes(fixed=True, length=4, transform=LETTERBOX))) == 4
    with pytest.raises(IndexError, match="episode 4 of 4"):
        episodes(length=4)[0, 4]
