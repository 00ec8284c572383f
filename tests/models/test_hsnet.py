"""HSNet gives the numbers of juhongm999/hsnet, at any image size."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.vgg import cfgs, make_layers

from svf_lightning.backbones.efficientnet import efficientnet_lite0
from svf_lightning.backbones.resnet import resnet50, resnet101
from svf_lightning.backbones.vgg import vgg16
from svf_lightning.episode import Episode, Prediction
from svf_lightning.finetune import svf
from svf_lightning.models.hsnet import CenterPivotConv4d, HSNet, correlate, hyperfeatures, vote
from svf_lightning.runs.official import from_official
from svf_lightning.training.losses import cross_entropy
from tests.golden import cases
from tests.models.test_baseline import plain_state, tiny_episode

GAP = 10 * 1.1e-6 / 0.77  # ten times the float64 gap that the golden case states, relative


@pytest.fixture(scope="module")
def official():
    """The golden case, our model, and one training step with all that passes on the way."""
    case, stored = cases.load("hsnet/r50_1shot")
    model = from_official("hsnet", plain_state(case)).train()
    seen = {}
    learner = model.hpn_learner
    for level in (2, 3, 4):
        learner.get_submodule(f"encoder_layer{level}").register_forward_hook(
            lambda _, i, out, level=level: seen.update({f"corr_l{level}": i[0]})
        )
    learner.encoder_layer2.register_forward_hook(lambda _, i, out: seen.update(squeezed_l2=out))
    learner.encoder_layer3to2.register_forward_hook(  # the official one is upsampled, not yet added to
        lambda _, i, out: seen.update(hypercorr_mix43=i[0] - seen.pop("squeezed_l2"))
    )
    learner.encoder_layer3to2.register_forward_hook(lambda _, i, out: seen.update(hypercorr_mix432=out))
    learner.decoder1.register_forward_hook(lambda _, i, out: seen.update(hypercorr_encoded=i[0]))
    learner.decoder2.register_forward_hook(lambda _, i, out: seen.update(hypercorr_decoded=i[0]))
    learner.register_forward_hook(lambda _, i, out: seen.update(learner_out=out))
    episode = cases.episode(case)
    prediction = model(episode)
    seen["logit_mask"] = prediction.logits
    seen["predict_mask_nshot"] = prediction.logits.argmax(dim=1)
    loss = cross_entropy(prediction, episode)
    loss.backward()
    return case, stored, model, seen, loss.item()


def test_logits_and_all_that_leads_to_them_are_those_of_the_official_code(official):
    case, stored, _, seen, _ = official
    assert seen.keys() == case["arrays"].keys()
    for name, value in seen.items():
        cases.close(value, stored[name], case["arrays"][name], GAP)


def test_loss_and_gradient_norms_are_those_of_the_official_code(official):
    case, _, model, _, loss = official
    assert loss == pytest.approx(case["losses"]["objective"], rel=GAP)
    ours = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == case["gradient_norms"].keys()
    for name, norm in case["gradient_norms"].items():
        assert ours[name] == pytest.approx(norm, rel=1e-3), name


def test_a_centre_pivot_convolution_is_a_4d_convolution_with_a_mostly_empty_kernel():
    torch.manual_seed(0)
    size, stride = 5, 4
    conv = CenterPivotConv4d(2, 3, size, stride).double()
    x = torch.randn(2, 2, 4, 5, 9, 6, dtype=torch.float64)
    kernel = torch.zeros(3, 2, *4 * (size,), dtype=torch.float64)
    kernel[:, :, :, :, 2, 2] += conv.conv1.weight  # centred on the support
    kernel[:, :, 2, 2] += conv.conv2.weight  # centred on the query
    padded = F.pad(x, 8 * [2])
    for axis, step in ((2, 1), (3, 1), (4, stride), (5, stride)):
        padded = padded.unfold(axis, size, step)  # the window becomes the last axis
    expected = torch.einsum("nihwstabcd,oiabcd->nohwst", padded, kernel)
    expected += (conv.conv1.bias + conv.conv2.bias)[:, None, None, None, None]
    assert expected.shape == (2, 3, 4, 5, 3, 2)
    torch.testing.assert_close(conv(x), expected)


def test_correlation_is_the_clipped_cosine_of_masked_features():
    torch.manual_seed(0)
    query, support = [torch.randn(2, 5, 2, 3)], [torch.randn(4, 5, 3, 2)]  # two shots each
    masks = torch.ones(4, 3, 2)
    masks[1, 0, 0] = 0
    found = correlate(query, support, masks)
    assert found.shape == (4, 1, 2, 3, 3, 2)
    for pair, (i, j, s, t) in ((3, (1, 2, 2, 1)), (2, (0, 0, 1, 0)), (1, (0, 1, 1, 1))):
        cosine = F.cosine_similarity(query[0][pair // 2, :, i, j], support[0][pair, :, s, t], dim=0)
        torch.testing.assert_close(found[pair, 0, i, j, s, t], cosine.clamp_min(0), atol=1e-4, rtol=0)
    assert not found[1, 0, :, :, 0, 0].any()


def torchvision_vgg16():
    """The convolutions and pools of torchvision's, without its large classifier."""
    return make_layers(cfgs["D"])


def test_vgg_gives_the_maps_of_torchvision_before_their_relu_and_after_the_last_pool():
    torch.manual_seed(0)
    theirs, ours = torchvision_vgg16(), vgg16(batch_norm=False, ceil_mode=False)
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    x = torch.randn(1, 3, 75, 64)  # 75 is rounded at every pool
    with torch.no_grad():
        levels = hyperfeatures(ours, x)
        assert [len(level) for level in levels] == [3, 3, 1]
        maps = [feature for level in levels for feature in level]
        for feature, index in zip(maps, (17, 19, 21, 24, 26, 28, 30), strict=True):
            torch.testing.assert_close(feature, theirs[: index + 1](x))


def episode_of_size(height, width, shot=1):
    episode = tiny_episode(shot, side=max(height, width))
    return Episode(
        episode.query_image[..., :height, :width],
        episode.query_mask[..., :height, :width],
        episode.support_images[..., :height, :width],
        episode.support_masks[..., :height, :width],
        episode.class_id,
    )


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return HSNet(efficientnet_lite0(weights=None), channels=8).eval()


def test_one_object_takes_one_size_after_another_and_gives_what_a_fresh_one_would(small):
    fresh = copy.deepcopy(small)
    with torch.no_grad():
        for height, width in ((65, 97), (129, 129), (33, 65)):
            logits = small(episode_of_size(height, width)).logits
            assert logits.shape == (2, 2, height, width)
            assert torch.equal(copy.deepcopy(fresh)(episode_of_size(height, width)).logits, logits)


def test_efficientnet_gives_the_outputs_of_its_blocks(small):
    levels = hyperfeatures(small.backbone, torch.zeros(1, 3, 129, 129))
    assert [len(level) for level in levels] == [2, 6, 5]
    assert [{tuple(f.shape[2:]) for f in level} for level in levels] == [{(17, 17)}, {(9, 9)}, {(5, 5)}]
    last = small.backbone(torch.zeros(1, 3, 129, 129))[2:]
    for level, feature, scale in zip(levels, last, small.backbone.scale[2:], strict=True):
        torch.testing.assert_close(level[-1], feature * scale)


@pytest.mark.parametrize(
    "build", [lambda: efficientnet_lite0(weights=None, output_stride=8), lambda: vgg16(weights=None)]
)
def test_levels_whose_support_maps_do_not_shrink_to_one_size_still_mix(build):
    model = HSNet(build(), channels=8).eval()
    with torch.no_grad():
        logits = model(episode_of_size(65, 65)).logits
    assert logits.shape == (2, 2, 65, 65)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0]], [1, 0, 0]),  # 4, 1, 0 of five
        ([[1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]], [1, 1, 0]),  # 4, 2, 0: exactly a half
        ([[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]], [1, 1, 0]),  # at most one vote: one will do
        ([[0, 0, 0]] * 5, [0, 0, 0]),
    ],
)
def test_a_pixel_wins_with_half_the_votes_of_the_pixel_that_has_most(votes, expected):
    masks = torch.tensor(votes)[None, :, None, :]  # (B=1, K, 1, 3)
    logits = torch.stack([torch.zeros(masks.shape), 0.3 * (2 * masks - 1)], dim=2)
    assert vote(logits).argmax(dim=1).flatten().tolist() == expected


@pytest.mark.parametrize("shots", range(2, 11))
def test_the_vote_is_the_official_rule_for_random_masks(shots):
    masks = torch.randint(0, 2, (3, shots, 8, 8), generator=torch.Generator().manual_seed(shots))
    masks[0] *= torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.3
    total = masks.sum(dim=1)
    most = total.flatten(1).max(dim=1).values.clamp(min=1)
    expected = (2 * total >= most[:, None, None]).long()
    logits = torch.stack([1.0 - masks, masks.float()], dim=2)
    assert torch.equal(vote(logits).argmax(dim=1), expected)


def test_shots_are_matched_one_by_one_and_vote(small):
    episode = episode_of_size(65, 65, shot=3)

    def masks_of(shots):
        part = episode._replace(
            support_images=episode.support_images[:, shots], support_masks=episode.support_masks[:, shots]
        )
        with torch.no_grad():
            return small(part).logits.argmax(dim=1)

    singles = torch.stack([masks_of([k]) for k in range(3)])
    most = singles.sum(dim=0).flatten(1).max(dim=1).values
    expected = (2 * singles.sum(dim=0) >= most[:, None, None].clamp(min=1)).long()
    assert singles.float().mean() not in (0, 1)
    assert torch.equal(masks_of([0, 1, 2]), expected)
    assert torch.equal(masks_of([2, 0, 1]), expected)


def test_in_training_the_order_of_shots_changes_nothing_and_all_of_them_teach(small):
    model = copy.deepcopy(small).train()
    episode = episode_of_size(65, 65, shot=2)
    images = episode.support_images.clone().requires_grad_()
    logits = model(episode._replace(support_images=images)).logits
    swapped = episode._replace(
        support_images=episode.support_images.flip(1), support_masks=episode.support_masks.flip(1)
    )
    torch.testing.assert_close(model(swapped).logits, logits)
    cross_entropy(Prediction(logits), episode).backward()
    assert images.grad.flatten(2).abs().amax(dim=2).min() > 0


@pytest.mark.parametrize(
    ("build", "stages", "layers"),
    [
        (lambda: resnet50(stem="plain", dilation="none"), ("layer3.4", "layer4.2.conv1"), 4),
        (lambda: efficientnet_lite0(weights=None), ("layer3.1", "layer4.0.3"), 12),
        (lambda: vgg16(batch_norm=False), ("layer3.4", "layer4.2"), 2),
    ],
)
def test_singular_values_of_every_factored_layer_get_a_gradient(build, stages, layers):
    torch.manual_seed(0)
    model = HSNet(build(), channels=8).train()
    episode = episode_of_size(65, 65)
    before = model(episode).logits
    svf.prepare(model.backbone, stages=stages)
    after = model(episode).logits
    torch.testing.assert_close(after, before, atol=1e-3, rtol=0)
    cross_entropy(Prediction(after), episode).backward()
    gradients = [p.grad for p in model.backbone.parameters() if p.requires_grad]
    assert len(gradients) == layers
    assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: resnet50(stem="plain", dilation="none"), 2_573_794),
        (lambda: resnet101(stem="plain", dilation="none"), 2_587_394),
        (lambda: vgg16(batch_norm=False), 2_570_018),
    ],
)
def test_the_learner_has_as_many_parameters_as_the_official_one(build, count):
    assert sum(p.numel() for p in HSNet(build()).hpn_learner.parameters()) == count


def test_an_official_vgg_checkpoint_with_its_classifier_loads():
    theirs = torchvision_vgg16()
    learner = HSNet(vgg16(batch_norm=False)).hpn_learner
    official = {f"module.backbone.features.{key}": value for key, value in theirs.state_dict().items()}
    official["module.backbone.classifier.6.bias"] = torch.zeros(1000)
    official |= {f"module.hpn_learner.{key}": value for key, value in learner.state_dict().items()}
    model = from_official("hsnet", official, backbone="vgg16")
    assert torch.equal(model.backbone.layer4[4].weight, theirs[28].weight)
    assert torch.equal(model.hpn_learner.decoder2[2].bias, learner.decoder2[2].bias)
    pools = [m.ceil_mode for m in model.backbone.modules() if isinstance(m, nn.MaxPool2d)]
    assert pools == [False] * 4


def test_a_checkpoint_of_another_backbone_is_refused_by_key(official):
    state = plain_state(official[0])
    with pytest.raises(ValueError, match=r"has no 'backbone\.layer0\.0\.weight'"):
        from_official("hsnet", state, backbone="vgg16")
    with pytest.raises(ValueError, match=r"has no 'backbone\.layer3\.6\.conv1\.weight'"):
        from_official("hsnet", state, backbone="resnet101")


def test_void_can_count_as_background():
    logits = torch.tensor([[[[2.0, -1.0]], [[0.0, 3.0]]]])  # (1, 2, 1, 2)
    void = tiny_episode(1)._replace(query_mask=torch.tensor([[[1, 255]]]))
    as_background = void._replace(query_mask=torch.tensor([[[1, 0]]]))
    prediction = Prediction(logits)
    assert cross_entropy(prediction, void, void_is_background=True) == cross_entropy(
        prediction, as_background
    )
    assert cross_entropy(prediction, void) == F.cross_entropy(logits[..., :1], torch.tensor([[[1]]]))


@pytest.mark.parametrize("option", [{"channels": 12}, {"channels": 0}, {"shot": 0}])
def test_an_option_without_meaning_is_refused_by_name(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        HSNet(efficientnet_lite0(weights=None), **option)


def test_images_too_small_for_a_vgg_are_refused_by_size():
    model = HSNet(vgg16(batch_norm=False, ceil_mode=False), channels=8).eval()
    with pytest.raises(ValueError, match=r"images are \(31, 31\), but .* needs 32 pixels or more"):
        model(tiny_episode(1, side=31))
    assert model(tiny_episode(1, side=32)).logits.shape == (2, 2, 32, 32)
