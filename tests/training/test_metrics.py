"""Scores are those that the official codes compute on the same predictions."""

import numpy as np
import pytest
import torch

from svf_lightning.training.metrics import FewShotIoU, confusion_matrix, intersection_and_union
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


def confusions(prediction, target):
    """The confusion matrix of each episode, shape ``(6, 2, 2)``."""
    pairs = zip(prediction, target, strict=True)
    return torch.stack([confusion_matrix(p, t) for p, t in pairs])


def without_ignore(episodes):
    """The episodes as codes count them that know no ignore label."""
    prediction, target = episodes
    return prediction, torch.where(target == 255, 0, target)


@pytest.mark.parametrize("version", ["per_episode_intersection_union_target", "per_episode_gpu_version"])
def test_intersection_union_and_area_of_each_episode_are_pfenets(episodes, version):
    case, _ = cases.load("metrics/pfenet")
    for prediction, target, expected in zip(*episodes, case[version], strict=True):
        intersection, union = intersection_and_union(prediction, target)
        area = confusion_matrix(prediction, target).sum(dim=1)
        assert [intersection.tolist(), union.tolist(), area.tolist()] == expected


def test_labels_of_five_classes_are_counted_as_pfenet_counts_them():
    case, _ = cases.load("metrics/pfenet")
    prediction, target = (
        torch.from_numpy(fill.integers("metrics/episodes", f"multi_{side}", [3, 20, 20], 5))
        for side in ("pred", "target")
    )
    target[0, 0] = 255

    intersection, union = intersection_and_union(prediction, target, labels=5)

    area = confusion_matrix(prediction, target, labels=5).sum(dim=1)
    expected = case["five_classes"]["intersection_union_target"]
    assert [intersection.tolist(), union.tolist(), area.tolist()] == expected


def test_class_iou_is_pfenets(episodes):
    case, _ = cases.load("metrics/pfenet")
    ours = dict(zip(range(1, 6), score(episodes)["class_iou"].tolist(), strict=True))
    assert ours == pytest.approx({int(c): v for c, v in case["class_foreground_iou"].items()}, abs=1e-9)


def test_intersection_and_union_of_each_episode_are_hsnets(episodes):
    case, _ = cases.load("metrics/hsnet")
    for prediction, target, expected in zip(*episodes, case["per_episode_inter_union"], strict=True):
        assert [side.tolist() for side in intersection_and_union(prediction, target)] == expected


def test_miou_and_fb_iou_are_hsnets(episodes):
    case, _ = cases.load("metrics/hsnet")
    ours = score(episodes)
    assert 100 * ours["miou"].item() == pytest.approx(case["miou_percent"], abs=1e-4)
    assert 100 * ours["fb_iou"].item() == pytest.approx(case["fb_iou_percent"], abs=1e-4)


def test_miou_is_that_of_mining_fss_which_averages_over_the_classes_that_occur(episodes):
    case, _ = cases.load("metrics/mlc")
    assert score(episodes)["miou"].item() == pytest.approx(case["mean_iou"], abs=1e-9)


def test_panet_differs_only_in_the_episode_without_foreground(episodes):
    case, _ = cases.load("metrics/panet")
    ours = score(episodes)["class_iou"].tolist()
    others = [0, 1, 3, 4]  # class 3 has the episode whose false positives PANet loses
    assert [ours[i] for i in others] == pytest.approx([case["class_iou"][i] for i in others], abs=1e-9)
    assert ours[2] < case["class_iou"][2]


def test_panets_numbers_are_our_sums_without_what_is_predicted_where_nothing_is(episodes):
    case, _ = cases.load("metrics/panet")
    counts = confusions(*episodes)
    counts[counts[:, 1].sum(dim=1) == 0, 0, 1] = 0  # no foreground: no false positives

    def iou(counts):  # (2, 2), summed over episodes
        return (counts.diagonal() / (counts.sum(dim=0) + counts.sum(dim=1) - counts.diagonal())).tolist()

    of_class = [
        iou(sum(c for c, i in zip(counts, CLASS_OF_EPISODE, strict=True) if i == label))[1]
        for label in case["labels"]
    ]
    assert of_class == pytest.approx(case["class_iou"], abs=1e-6)
    assert np.mean(of_class) == pytest.approx(case["mean_iou"], abs=1e-6)
    foreground = iou(counts.sum(dim=0))[1]
    assert foreground == pytest.approx(case["binary_class_iou"][1], abs=1e-6)
    # PANet's background keeps the false positives that its foreground has lost.
    background = iou(confusions(*episodes).sum(dim=0))[0]
    assert background == pytest.approx(case["binary_class_iou"][0], abs=1e-6)
    assert (background + foreground) / 2 == pytest.approx(case["binary_mean_iou"], abs=1e-6)


@pytest.mark.parametrize(("label", "name"), [(0, "background"), (1, "foreground")])
def test_with_ignored_pixels_made_background_the_counts_are_canets(episodes, label, name):
    case, _ = cases.load("metrics/canet")
    counts = confusions(*without_ignore(episodes))
    rows = [intersection_and_union(*pair) for pair in zip(*without_ignore(episodes), strict=True)]
    inter, union = (torch.stack(side)[:, label] for side in zip(*rows, strict=True))
    assert inter.tolist() == case[name]["inter"]
    assert union.tolist() == case[name]["union"]
    assert (inter.double() / union).tolist() == pytest.approx(case[name]["iou"], abs=1e-9)
    assert counts[:, :, label].sum(dim=1).tolist() == case[name]["predicted"]


def test_with_ignored_pixels_made_background_the_scores_are_those_of_pmms(episodes):
    case, _ = cases.load("metrics/pmms")
    of_class = score(without_ignore(episodes), classes=range(1, 21))["class_iou"]
    assert of_class.tolist() == pytest.approx(case["iou_list"], abs=1e-6)
    for group, expected in enumerate(case["group_mean_iou"]):
        classes = range(5 * group + 1, 5 * group + 6)
        assert of_class[[c - 1 for c in classes]].mean().item() == pytest.approx(expected, abs=1e-6)
    assert score(without_ignore(episodes))["miou"].item() == pytest.approx(
        case["group_mean_iou"][0], abs=1e-6
    )


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
