"""BAM gives the numbers of the official codes (chunbolang/BAM and zechao-li/SVF-few-shot-segmentation)."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from svf_lightning.backbones.resnet import resnet50
from svf_lightning.backbones.vgg import vgg16
from svf_lightning.episode import Episode
from svf_lightning.finetune import frozen, svf
from svf_lightning.models.bam import BAM, gram_difference
from svf_lightning.models.blocks import resize
from svf_lightning.models.pspnet import PSPNet
from svf_lightning.runs.official import from_official
from svf_lightning.training.losses import cross_entropy
from tests.golden import cases, fill

GAP = 10 * 8.2e-7 / 0.68  # ten times the float64 gap that the golden case states, relative


def official_state(case):
    """The state dict of a plain official model; second names of a tensor are filled alike."""

    def first_name(key):
        return re.sub(r"^encoder\.(\d)\.", r"layer\1.", re.sub(r"^(layer\d)p\.", r"\1.", key))

    empty = {key: torch.empty(shape) for key, shape, _ in case["state_dict"]}
    return fill.fill_state_dict(empty, rename=first_name)


def official_svf_state(case, plain_case):
    """What the official SVF code saves: layer0 to layer4 factored, the stem's rank cut to 24."""
    state = official_state(plain_case)
    for key, shape, _ in case["state_dict"]:
        if key.endswith(".vector_S"):
            name, rank = key.removesuffix(".vector_S"), shape[1]
            weight = state.pop(f"{name}.weight")
            u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
            state[f"{name}.conv_U.weight"] = u[:, :rank, None, None]
            state[key] = s[:rank].view(1, -1, 1, 1)
            state[f"{name}.conv_V.weight"] = vh[:rank].unflatten(1, weight.shape[1:])
    assert {k: list(v.shape) for k, v in state.items()} == {k: s for k, s, _ in case["state_dict"]}
    return state


def inputs(case):
    """The official inputs; class ids count from 1, so that they are the class index plus one."""
    [index] = case["inputs"]["cat_idx"]
    return cases.episode(case)._replace(class_id=torch.tensor(index) + 1)


def base_label(case):
    """The label that the golden JSON describes, ``(B, H, W)``."""
    count, *_, side = case["inputs"]["query"]["shape"]
    block = torch.arange(side) // -(-side // 4)
    label = (block[:, None] * 4 + block) % 16
    label[:, :3] = 255
    return label.expand(count, -1, -1)


def without_dropout(model):
    """Train mode as the golden cases have it: batch norms in eval mode, no dropout."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout2d) or "BatchNorm" in type(module).__name__:
            module.eval()
    return model


def watch(model, episode):
    """Inputs of the layers where the official intermediate results meet."""
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0]))
        for name, module in model.named_children()
        if name in ("init_merge", "gram_merge", "cls_merge")
    ]
    outputs = model.outputs(episode)
    for hook in hooks:
        hook.remove()
    [merged], [*_, final] = seen["init_merge"], seen["cls_merge"]
    intermediate = {
        "prototype": merged[:, 256:512, :1, :1],
        "prior_mask": merged[:, 512:],
        "est_val": seen["gram_merge"][0][:, 1:, :1, :1],
        "base_map": final[:, 1:],
        "merge_map": final,
        "merge_bg": outputs.ensemble[:, :1],
    }
    return outputs, intermediate


@pytest.fixture(scope="module")
def original():
    case, stored = cases.load("bam/r50_1shot")
    return case, stored, from_official("bam", official_state(case)), inputs(case)


@pytest.fixture(scope="module")
def svf_off():
    case, stored = cases.load("svf_bam/r50_1shot")
    return case, stored, from_official("svf_bam", official_state(case)), inputs(case)


@pytest.fixture(scope="module")
def svf_on():
    case, stored = cases.load("svf_bam/r50_1shot_svf")
    state = official_svf_state(case, cases.load("svf_bam/r50_1shot")[0])
    return case, stored, from_official("svf_bam", state), inputs(case)


CASES = ["original", "svf_off", "svf_on"]


@pytest.mark.parametrize("which", CASES)
def test_all_three_outputs_and_what_leads_to_them_are_those_of_the_official_code(which, request):
    case, stored, model, episode = request.getfixturevalue(which)
    with torch.no_grad():
        outputs, intermediate = watch(model.eval(), episode)
    size = episode.query_image.shape[-2:]
    ours = {
        "out_final_out": resize(outputs.ensemble, size),
        "out_meta_out": resize(outputs.meta, size),
        "out_base_out": resize(outputs.base, size),
        **intermediate,
    }
    compared = [name for name in ours if name in stored]
    assert len(compared) >= 8
    for name in compared:
        # A prior is a difference of near cosines, stretched to [0, 1], and their rounding with it.
        gap = 5 * GAP if name == "prior_mask" else GAP
        cases.close(ours[name], stored[name], case["arrays"][name], gap)


@pytest.mark.parametrize("which", CASES)
def test_losses_and_gradient_norms_are_those_of_the_official_code(which, request):
    case, _, model, episode = request.getfixturevalue(which)
    without_dropout(model).zero_grad()
    prediction = model(episode)
    loss = cross_entropy(prediction, episode)
    loss.backward()

    official = case["losses"].get("Base", case["losses"])
    assert loss.item() == pytest.approx(official["main"] + official["aux1"], rel=GAP)
    meta = F.cross_entropy(prediction.auxiliary["meta"], episode.query_mask, ignore_index=255)
    assert meta.item() == pytest.approx(official["aux1"], rel=GAP)
    with torch.no_grad():
        base = resize(model.outputs(episode).base, episode.query_image.shape[-2:])
    inert = F.cross_entropy(base, base_label(case), ignore_index=255)
    assert inert.item() == pytest.approx(official["aux2"], rel=GAP)

    ours = {
        name.removeprefix("backbone.").replace(".s", ".vector_S"): parameter.grad.norm().item()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert ours.keys() == case["gradient_norms"].keys()
    for name, norm in case["gradient_norms"].items():
        # Gradients of singular values are inexact: the golden case states its own gaps of up to 2e-4.
        assert ours[name] == pytest.approx(norm, rel=10 * 2e-4 if name.startswith("layer") else 1e-4), name


def test_in_training_the_own_class_is_left_out_of_the_base_map(original):
    case, stored, model, episode = original
    with torch.no_grad():
        _, intermediate = watch(without_dropout(model), episode)
        novel = cross_entropy(model(episode._replace(class_id=torch.tensor([99, 99]))), episode)
    info = case["arrays"]["base_map_train"]
    cases.close(intermediate["base_map"], stored["base_map_train"], info, GAP)
    losses = case["losses"]["Novel"]
    assert novel.item() == pytest.approx(losses["main"] + losses["aux1"], rel=GAP)


def test_gradients_of_the_stored_singular_values_are_the_official_ones(svf_on):
    case, stored, model, episode = svf_on
    without_dropout(model).zero_grad()
    cross_entropy(model(episode), episode).backward()
    for name in case["svf"]["stored_convs"]:
        s = model.backbone.get_submodule(name).s
        torch.testing.assert_close(
            s.detach(), torch.from_numpy(stored[f"S/{name}"]).flatten(), rtol=1e-4, atol=1e-5
        )
        official = torch.from_numpy(stored[f"grad_S/{name}"]).flatten()
        gap = (s.grad - official).norm() / official.norm()
        stated = 10 * case["svf"]["grad_S_relative_gap_to_float64"][name]
        assert gap < max(stated, cases.FACTOR_GAP), name


def test_the_base_learner_alone_gives_the_official_numbers():
    case, stored = cases.load("bam/pspnet_base")
    model = from_official("bam_base", official_state(case))
    images = cases.episode(case).query_image
    with torch.no_grad():
        cases.close(model(images), stored["out"], case["arrays"]["out"], 1e-5)
    loss = F.cross_entropy(without_dropout(model)(images), base_label(case), ignore_index=255)
    loss.backward()
    assert loss.item() == pytest.approx(case["losses"]["main"], rel=1e-5)
    ours = {n.removeprefix("backbone."): p.grad.norm().item() for n, p in model.named_parameters()}
    assert ours == pytest.approx(case["gradient_norms"], rel=1e-3)


def tiny_episode(shot, class_id=1, side=33):
    generator = torch.Generator().manual_seed(shot)
    image = torch.randn(2, shot + 1, 3, side, side, generator=generator)
    mask = torch.randint(0, 2, (2, shot + 1, side, side), generator=generator)
    return Episode(image[:, 0], mask[:, 0], image[:, 1:], mask[:, 1:], torch.full((2,), class_id))


def tiny_bam(shot=1, **options):
    """A BAM with a VGG-16, a narrow head and three base classes, 6 to 8."""
    torch.manual_seed(0)
    pspnet = PSPNet(vgg16(weights=None), classes=3, train_batch_norm=False)
    learner = nn.Sequential(pspnet.ppm, pspnet.cls)
    return BAM(
        pspnet.backbone, shot, base_learner=learner, base_classes=(6, 7, 8), channels=4, **options
    ).eval()


def test_an_image_differs_from_itself_by_nothing_and_from_another_by_its_channels_cosines():
    generator = torch.Generator().manual_seed(0)
    query, other = torch.rand(2, 1, 6, 5, 4, generator=generator)

    def cosines(image):
        rows = image[0].flatten(1)
        return torch.stack([F.cosine_similarity(row[None], rows) for row in rows])

    expected = (cosines(query) - cosines(other)).square().mean().sqrt()
    found = gram_difference(query, torch.stack([query, other], dim=1))
    torch.testing.assert_close(found, torch.stack([torch.zeros(()), expected])[None])


def test_the_order_of_the_supports_makes_no_difference():
    model, episode = tiny_bam(shot=3), tiny_episode(shot=3)
    order = [2, 0, 1]
    turned = episode._replace(
        support_images=episode.support_images[:, order], support_masks=episode.support_masks[:, order]
    )
    weights = model.shot_weights(torch.tensor([[0.1, 0.5, 0.3]]))
    assert weights.unique().numel() == 3  # or nothing would be tested
    with torch.no_grad():
        torch.testing.assert_close(model(turned).logits, model(episode).logits)


@pytest.mark.parametrize(("trained", "used"), [(5, 1), (1, 5)])
def test_a_checkpoint_of_another_number_of_shots_is_refused(trained, used):
    state = {"learner_base.1.4.bias": torch.zeros(16)}
    if trained > 1:
        state["kshot_rw.2.bias"] = torch.zeros(trained)
    with pytest.raises(ValueError, match=rf"trained for {trained} shot\(s\).*but shot={used}"):
        from_official("bam", state, shot=used)


def test_an_episode_of_another_number_of_shots_is_refused():
    with pytest.raises(ValueError, match=r"weighs 1 shot\(s\) and got 2; take or train one with shot=2"):
        tiny_bam(shot=1)(tiny_episode(shot=2))


def test_a_checkpoint_of_something_else_is_refused():
    with pytest.raises(ValueError, match="no checkpoint of BAM"):
        from_official("bam", {"layer0.0.weight": torch.zeros(1)})


def test_fine_tuning_does_not_reach_the_base_learner():
    model, episode = tiny_bam(own_stages=["layer2", "layer3.0", "layer4"]), tiny_episode(shot=1)
    with torch.no_grad():
        before = model.outputs(episode)
        svf.prepare(model.backbone)
        for name, parameter in model.backbone.named_parameters():
            if parameter.requires_grad:
                assert not name.startswith(("layer0", "layer1"))
                parameter.mul_(1.5)
        after = model.outputs(episode)
    torch.testing.assert_close(after.base, before.base)
    assert not torch.allclose(after.meta, before.meta)


def test_stages_that_stay_frozen_are_shared_and_the_others_are_not():
    model = tiny_bam(own_stages=["layer3", "layer4"])
    shared = [
        getattr(model.backbone, f"layer{i}") is getattr(model.base_backbone, f"layer{i}") for i in range(5)
    ]
    assert shared == [True, True, True, False, False]
    assert not hasattr(tiny_bam(), "base_backbone")


def test_a_shared_backbone_gives_what_a_copy_of_it_gives():
    stages = [f"layer{i}" for i in range(5)]
    with torch.no_grad():
        separate, shared = (tiny_bam(own_stages=own)(tiny_episode(1)).logits for own in (stages, []))
    torch.testing.assert_close(separate, shared)


def test_training_a_stage_that_the_base_learner_shares_is_refused_by_name():
    model = tiny_bam(own_stages=["layer4"])
    svf.prepare(model.backbone, stages=["layer3", "layer4"])
    with pytest.raises(ValueError, match=r"layer3 of the backbone trains.*own_stages"):
        model.train()(tiny_episode(shot=1))


@pytest.mark.parametrize(("shot", "count"), [(1, 4_917_254), (5, 4_917_281)])
def test_as_many_parameters_train_as_in_the_official_code(shot, count):
    pspnet = PSPNet(resnet50(weights=None), 15)
    learner = nn.Sequential(pspnet.ppm, pspnet.cls)
    model = BAM(pspnet.backbone, shot, base_learner=learner, base_classes=range(1, 16))
    frozen.prepare(model.backbone)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_batch_norms_learn_statistics_in_the_first_stage_and_never_after():
    pspnet = PSPNet(vgg16(weights=None), classes=3)
    norms = [m for m in pspnet.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.training for norm in norms)  # as built: Lightning does not call train()
    learner = nn.Sequential(pspnet.ppm, pspnet.cls)
    model = BAM(pspnet.backbone, base_learner=learner, base_classes=(1, 2, 3), channels=4)
    assert model.training
    assert not any(norm.training for norm in norms)
    assert not any(norm.training for norm in norms if model.train())
