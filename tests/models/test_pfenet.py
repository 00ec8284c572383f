"""PFENet gives the numbers of both official codes, dvlab-research/PFENet and the SVF authors'."""

import pytest
import torch
from torch.nn import functional as F

from svf_lightning.backbones.resnet import resnet50, resnet101
from svf_lightning.backbones.vgg import vgg16
from svf_lightning.models.pfenet import PFENet
from svf_lightning.runs.official import from_official
from svf_lightning.training.losses import cross_entropy
from tests.golden import cases
from tests.models.test_baseline import loss_in_train_mode, official_svf_state, plain_state, tiny_episode

GAP = 10 * 6.5e-5 / 61.3  # ten times the float64 gap that the golden cases state, relative
PLAIN = ["pfenet/r50_1shot", "pfenet/r50_1shot_ignore", "svf_pfenet/r50_1shot"]
FACTORED = "svf_pfenet/r50_1shot_svf"


@pytest.fixture(scope="module")
def state():
    """All plain cases have one state dict: the two flavours differ in dilation only."""
    return plain_state(cases.load(PLAIN[0])[0])


@pytest.fixture(scope="module", params=[*PLAIN, FACTORED])
def step(request, state):
    """One training step on a golden case, batch norms in eval mode and dropout off."""
    case, stored = cases.load(request.param)
    if request.param == FACTORED:
        state = official_svf_state(case, cases.load(PLAIN[0])[0])
    model = from_official(request.param.split("/")[0], state)
    seen = {}
    stages = model.backbone
    for name in ("layer2", "layer3", "layer4"):
        getattr(stages, name).register_forward_hook(lambda _, i, out, name=name: seen.update({name: out}))
    for index, classifier in enumerate(model.inner_cls):
        classifier.register_forward_hook(
            lambda _, i, out, index=index: seen.update({f"inner_out_{index}": out})
        )
    model.cls.register_forward_hook(lambda _, i, out: seen.update(before_cls=i[0]))
    model.register_forward_hook(lambda _, i, out: seen.update(prediction=out))
    loss = loss_in_train_mode(model, cases.episode(case))
    loss.backward()
    return case, stored, model, seen, loss.item()


def test_logits_are_those_of_the_official_code(step):
    case, stored, _, seen, _ = step
    cases.close(seen["prediction"].logits, stored["out"], case["arrays"]["out"], GAP)


def test_features_and_inner_logits_are_those_of_the_official_code(step):
    case, stored, _, seen, _ = step
    batch = len(seen["prediction"].logits)
    ours = {f"query_feat_{i}": seen[f"layer{i}"][:batch] for i in (2, 3, 4)}
    ours["supp_feat_4"] = seen["layer4"][batch:]
    ours |= {f"inner_out_{i}": seen[f"inner_out_{i}"] for i in range(4)}
    if "query_feat_before_cls" in stored:
        ours["query_feat_before_cls"] = seen["before_cls"]
    for name, value in ours.items():
        cases.close(value, stored[name], case["arrays"][name], 3 * GAP)


def test_losses_and_gradients_are_those_of_the_official_code(step):
    case, stored, model, seen, loss = step
    main = cross_entropy(seen["prediction"]._replace(auxiliary={}), cases.episode(case)).item()
    assert main == pytest.approx(case["losses"]["main"], rel=GAP)
    assert loss - main == pytest.approx(case["losses"]["aux"], rel=10 * GAP)
    official = case["gradient_norms"]
    ours = {
        name.removeprefix("backbone.").replace(".s", ".vector_S"): parameter.grad.norm().item()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert ours.keys() == official.keys()
    for name, norm in official.items():
        # Through layer4 the gradient is tiny: it comes by the prior's best match alone.
        tolerance = 1e-2 if name.startswith("layer4") else cases.FACTOR_NORM_GAP if "svf" in case else 3e-4
        assert ours[name] == pytest.approx(norm, rel=tolerance), name
    for name in case["svf"]["stored_convs"] if "svf" in case else ():
        s = model.backbone.get_submodule(name).s
        singular, gradient = (
            torch.from_numpy(stored[f"{kind}/{name}"]).flatten() for kind in ("S", "grad_S")
        )
        torch.testing.assert_close(s.detach(), singular, rtol=1e-4, atol=1e-5)
        gap = (s.grad - gradient).norm() / gradient.norm()
        stated = 10 * case["svf"]["grad_S_relative_gap_to_float64"][name]
        assert gap < max(stated, cases.FACTOR_GAP), name


@pytest.fixture
def small():
    torch.manual_seed(0)
    return PFENet(vgg16(weights=None), channels=8, bins=(9, 3, 2)).eval()


def test_inner_logits_come_in_training_only_and_at_the_size_of_the_query(small):
    episode = tiny_episode(shot=1, side=49)
    assert small(episode).auxiliary == {}
    auxiliary = small.train()(episode).auxiliary
    assert {name: tuple(logits.shape) for name, logits in auxiliary.items()} == {
        f"inner_{i}": (2, 2, 49, 49) for i in range(3)
    }


def test_order_and_repetition_of_shots_change_nothing(small):
    episode = tiny_episode(shot=3, side=49)

    def taking(shots):
        images, masks = episode.support_images[:, shots], episode.support_masks[:, shots]
        with torch.no_grad():
            return small(episode._replace(support_images=images, support_masks=masks)).logits

    torch.testing.assert_close(taking([2, 0, 1]), taking([0, 1, 2]))
    torch.testing.assert_close(taking([1, 1]), taking([1]))
    assert not torch.allclose(taking([0]), taking([1]), atol=1e-4)


def test_a_model_takes_any_size_after_any_other(small):
    def of_size(height, width):
        generator = torch.Generator().manual_seed(0)
        episode = tiny_episode(shot=1, side=97)
        image = torch.randn(2, 3, height, width, generator=generator)
        with torch.no_grad():
            return small(
                episode._replace(
                    query_image=image,
                    support_images=image[:, None],
                    support_masks=episode.support_masks[..., :height, :width],
                )
            ).logits

    before = of_size(49, 97)
    assert before.shape == (2, 2, 49, 97)
    assert of_size(33, 33).shape == (2, 2, 33, 33)
    assert torch.equal(of_size(49, 97), before)


def test_fractions_of_the_feature_map_are_the_bins_that_they_come_to(small):
    episode = tiny_episode(shot=1, side=129)  # 9 x 9 positions at the stride of 16
    with torch.no_grad():
        small.bins = (9, 4, 2)
        whole = small(episode).logits
        small.bins = (1.0, 0.5, 0.25)
        torch.testing.assert_close(small(episode).logits, whole, rtol=0, atol=0)
        small.bins = (1.0, 0.5, 0.01)  # less than a position is one
        assert small(episode).logits.isfinite().all()


@pytest.mark.parametrize("shot", [1, 2])
def test_batch_statistics_drift_as_if_query_and_each_shot_were_batches_of_their_own(shot):
    episode = tiny_episode(shot=shot, side=33)
    model = PFENet(vgg16(weights=None), channels=8, batch_norm="batch")
    conv, norm = model.backbone.layer0[0], model.backbone.layer0[1]
    mean = norm.running_mean.clone()
    for images in (episode.query_image, *episode.support_images.unbind(1)):
        mean = 0.9 * mean + 0.1 * F.conv2d(images, conv.weight, conv.bias, padding=1).mean(dim=(0, 2, 3))
    model.eval()(episode)
    assert not norm.running_mean.any()
    model.train()(episode)
    torch.testing.assert_close(norm.running_mean, mean.detach())


def test_the_statistics_of_the_backbone_stay_fixed_by_default(small):
    small.train()(tiny_episode(shot=1))
    assert not any(b.any() for n, b in small.backbone.named_buffers() if n.endswith("running_mean"))


def test_the_head_trains_at_the_finer_grid_with_priors_of_several_stages():
    model = PFENet(vgg16(weights=None), channels=8, bins=(4, 2), grid="layer2", prior_stages=(2, 3, 4))
    shapes = []
    model.down_query.register_forward_hook(lambda _, i, out: shapes.append(tuple(out.shape)))
    episode = tiny_episode(shot=1, side=65)
    cross_entropy(model(episode), episode).backward()
    assert shapes == [(2, 8, 9, 9)]  # stride 8, where stages 3 and 4 have 5 x 5
    head = {n: p.grad for n, p in model.named_parameters() if not n.startswith("backbone.")}
    assert all(gradient is not None for gradient in head.values())


@pytest.mark.parametrize(
    ("build", "count"), [(resnet50, 10_817_034), (resnet101, 10_817_034), (vgg16, 10_423_818)]
)
def test_the_head_has_as_many_parameters_as_the_official_one(build, count):
    model = PFENet(build(weights=None))
    head = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("backbone."))
    assert head == count


def test_the_two_flavours_differ_in_dilation_and_svf_factors_belong_to_one(state):
    dilations = {
        flavour: from_official(flavour, state).backbone.layer3[0].conv2.dilation
        for flavour in ("pfenet", "svf_pfenet")
    }
    assert dilations == {"pfenet": (2, 2), "svf_pfenet": (1, 1)}
    with pytest.raises(ValueError, match=r"layer2\.0\.conv1\.vector_S.*method 'svf_pfenet'"):
        from_official("pfenet", {**state, "layer2.0.conv1.vector_S": torch.ones(1, 64, 1, 1)})


def test_a_checkpoint_of_another_method_or_backbone_is_refused_by_key(state):
    baseline = plain_state(cases.load("baseline/r50_1shot")[0])
    with pytest.raises(ValueError, match=r"has no 'init_merge\.0\.0\.weight'"):
        from_official("pfenet", baseline)
    with pytest.raises(ValueError, match=r"layer0\.0\.bias"):
        from_official("pfenet", state, backbone="vgg16")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"bins": (60, 2.5)}, "bins must be"),
        ({"bins": ()}, "bins must be"),
        ({"grid": "layer4"}, "grid must be"),
        ({"prior_stages": (1,)}, "prior_stages must be"),
        ({"batch_norm": "train"}, "batch_norm must be"),
        ({"shot": 0}, "shot must be"),
    ],
)
def test_an_option_without_meaning_is_refused_by_name(option, message):
    with pytest.raises(ValueError, match=message):
        PFENet(vgg16(weights=None), **{"channels": 4, **option})
