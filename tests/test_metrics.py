"""Scores are those that the official codes compute on the same predictions."""

import numpy as np
import pytest
import torch

from svf_lightning.metrics import FewShotIoU, intersection_and_union
from tests.golden import cases, fill

CLASS_OF_EPISODE = [1, 3, 2, 5, 3, 4]


@pytest.fixture(scope="module")
def episodes():
    shape = [6, 37, 41]
    prediction = fill.integers("metrics/episodes", "pred", shape, 2)
    agree = fill.integers("metrics/episodes", "agree", shape, 4) > 0
    target = np.where(agree, prediction, 1 - prediction)
    target[1, :4] = 255
    target[2, :, 30:] = 255
    target[4] = 0
    return torch.from_numpy(prediction), torch.from_numpy(target)


def score(episodes, classes=range(1, 6)):
    iou = FewShotIoU(classes)
    for prediction, target, class_id in zip(*episodes, CLASS_OF_EPISODE, strict=True):
        iou.update(prediction, target, class_id)
    return iou.compute()


def test_intersection_and_union_of_each_episode_are_pfenets(episodes):
    case, _ = cases.load("metrics/pfenet")
    for prediction, target, expected in zip(
        *episodes, case["per_episode_intersection_union_target"], strict=True
    ):
        intersection, union = intersection_and_union(prediction, target)
        assert intersection.tolist() == expected[0]
        assert union.tolist() == expected[1]


def test_class_iou_is_pfenets(episodes):
    case, _ = cases.load("metrics/pfenet")
    ours = dict(zip(range(1, 6), score(episodes)["class_iou"].tolist(), strict=True))
    assert ours == pytest.approx({int(c): v for c, v in case["class_foreground_iou"].items()}, abs=1e-9)


def test_miou_and_fb_iou_are_hsnets(episodes):
    case, _ = cases.load("metrics/hsnet")
    ours = score(episodes)
    assert 100 * ours["miou"].item() == pytest.approx(case["miou_percent"], abs=1e-4)
    assert 100 * ours["fb_iou"].item() == pytest.approx(case["fb_iou_percent"], abs=1e-4)


def test_miou_of_the_labels_counts_background_as_mining_fss_does_not(episodes):
    """MiningFSS averages over the classes that occur, as we do, so its number is ours too."""
    case, _ = cases.load("metrics/mlc")
    assert score(episodes)["miou"].item() == pytest.approx(case["mean_iou"], abs=1e-9)


def test_panet_differs_only_in_the_episode_without_foreground(episodes):
    case, _ = cases.load("metrics/panet")
    ours = score(episodes)["class_iou"].tolist()
    others = [0, 1, 3, 4]  # class 3 has the episode whose false positives PANet loses
    assert [ours[i] for i in others] == pytest.approx([case["class_iou"][i] for i in others], abs=1e-9)
    assert ours[2] < case["class_iou"][2]


@pytest.mark.parametrize(("name", "key"), [("canet", "foreground"), ("pmms", "iou_list")])
def test_with_ignored_pixels_made_background_the_counts_are_those_of(name, key, episodes):
    case, _ = cases.load(f"metrics/{name}")
    prediction, target = episodes
    target = torch.where(target == 255, 0, target)
    if name == "canet":
        rows = [intersection_and_union(p, t) for p, t in zip(prediction, target, strict=True)]
        assert [i[1].item() for i, _ in rows] == case[key]["inter"]
        assert [u[1].item() for _, u in rows] == case[key]["union"]
    else:
        assert score((prediction, target))["class_iou"].tolist() == pytest.approx(case[key][:5], abs=1e-6)


def test_order_of_episodes_does_not_change_the_score(episodes):
    prediction, target = episodes
    forward, backward = FewShotIoU(range(1, 6)), FewShotIoU(range(1, 6))
    for i in range(6):
        forward.update(prediction[i], target[i], CLASS_OF_EPISODE[i])
        backward.update(prediction[5 - i], target[5 - i], CLASS_OF_EPISODE[5 - i])
    assert torch.equal(forward.compute()["class_iou"], backward.compute()["class_iou"])


def test_a_class_that_is_not_under_test_is_refused_by_number():
    with pytest.raises(ValueError, match="class 7 is not under test"):
        FewShotIoU([1, 2]).update(torch.zeros(2, 2), torch.zeros(2, 2), 7)
