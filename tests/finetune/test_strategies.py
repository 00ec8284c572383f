"""The ways of fine-tuning: each starts at the pretrained network and trains what its paper trains."""

import copy
import importlib.util
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from svf_lightning.backbones.backbone import Backbone
from svf_lightning.backbones.resnet import resnet50, resnet101
from svf_lightning.backbones.vgg import vgg16
from svf_lightning.finetune import (
    bias,
    bn,
    channel_scale,
    frozen,
    full,
    lora,
    rotation,
    spectral_clip,
    svb,
    svf,
    vpt,
)
from svf_lightning.runs import export
from svf_lightning.svf.network import merge_svf, singular_values

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the extra [peft]")
ALL = ["layer2", "layer3", "layer4"]


def small():
    """Five stages with all that a strategy may meet: dilation, groups, biases, BatchNorm, 1x1 and 3x3."""
    torch.manual_seed(0)
    stages = [
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 8, 3, padding=2, dilation=2), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(
            nn.Conv2d(8, 4, 1, bias=False), nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6)
        ),
        nn.Sequential(nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(5)),
    ]
    net = Backbone(stages, (4, 6, 8, 6, 5), (1,) * 5)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5)
    return net


class Vit:
    """A vision transformer of four blocks of eight channels."""

    def __new__(cls):
        from timm.models.vision_transformer import Block

        torch.manual_seed(0)
        stages = [_Tokens(), *(_Stage(Block(8, 2, qkv_bias=True)) for _ in range(4))]
        return Backbone(stages, (8,) * 5, (4,) * 5)


class _Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, images):
        return self.patch(images), self.token.expand(len(images), -1, -1)


class _Stage(nn.Module):
    """A map and its class token through a block, as the stages of backbones/timm.py do it."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, state):
        x, prefix = state
        tokens = self.block(torch.cat([prefix, x.flatten(2).mT], dim=1))
        size = x.shape[-2] * x.shape[-1]
        return tokens[:, -size:].mT.unflatten(2, x.shape[-2:]), tokens[:, :-size]


# name -> (network, prepare, the parameters that train)
BNS = ["layer2.1", "layer3.2", "layer4.1"]
CONVS = ["layer2.0", "layer3.0", "layer3.1", "layer4.0"]
WEIGHTS = [f"{c}.weight" for c in CONVS] + ["layer2.0.bias", "layer3.1.bias", "layer4.0.bias"]
S = [f"{c}.s" for c in CONVS]
SCALES = [f"{c}.parametrizations.weight.0.t" for c in CONVS]
STRATEGIES = {
    "frozen": (small, frozen.prepare, []),
    "full": (small, full.prepare, [*WEIGHTS, "layer1.0.weight", "layer1.0.bias"]),
    "part": (small, partial(full.prepare, stages=ALL), WEIGHTS),
    "part 3x3": (
        small,
        partial(full.prepare, stages=ALL, kernels=["3x3"]),
        [name for name in WEIGHTS if name != "layer3.0.weight"],
    ),
    "part 1x1": (small, partial(full.prepare, stages=ALL, kernels=["1x1"]), ["layer3.0.weight"]),
    "bn": (small, bn.prepare, [f"{b}.{n}" for b in BNS for n in ("weight", "bias")]),
    "bn weight": (small, partial(bn.prepare, train=["weight"]), [f"{b}.weight" for b in BNS]),
    "bn bias": (small, partial(bn.prepare, train=["bias"]), [f"{b}.bias" for b in BNS]),
    "bn svf": (
        small,
        partial(bn.prepare, svf=True),
        S + [f"{b}.{n}" for b in BNS for n in ("weight", "bias")],
    ),
    "bias": (
        small,
        bias.prepare,
        [f"{b}.bias" for b in BNS] + ["layer2.0.bias", "layer3.1.bias", "layer4.0.bias"],
    ),
    "svf": (small, svf.prepare, S),
    "svf u": (small, partial(svf.prepare, train=["u"]), [f"{c}.u" for c in CONVS]),
    "svf v": (small, partial(svf.prepare, train=["v"]), [f"{c}.vh" for c in CONVS]),
    "svf usv": (
        small,
        partial(svf.prepare, train=["u", "s", "v"]),
        [f"{c}.{n}" for c in CONVS for n in ("u", "s", "vh")],
    ),
    "svf 1x1": (small, partial(svf.prepare, kernels=["1x1"]), ["layer3.0.s"]),
    "svf exp": (small, partial(svf.prepare, parametrization="exp"), [f"{c}.a" for c in CONVS]),
    "svf both": (
        small,
        partial(svf.prepare, parametrization="both"),
        [f"{c}.{n}" for c in CONVS for n in ("a", "s")],
    ),
    "scale output": (small, partial(channel_scale.prepare, side="output"), SCALES),
    "scale input tap": (small, channel_scale.prepare, SCALES),
    "scale input": (small, partial(channel_scale.prepare, side="input"), SCALES),
    "rotation": (small, rotation.prepare, S),
    "svb": (small, svb.prepare, S),
    "svb kernel": (small, partial(svb.prepare, train="kernel"), WEIGHTS),
    "spectral clip": (small, spectral_clip.prepare, WEIGHTS),
    "spectral clip s": (small, partial(spectral_clip.prepare, train="s"), S),
    "lora": (
        small,
        partial(lora.prepare, rank=2),
        [f"{c}.lora_{ab}.default.weight" for c in CONVS if c != "layer3.1" for ab in "AB"],
    ),
    "dora": (
        small,
        partial(lora.prepare, rank=2, dora=True),
        [
            f"{c}.{name}.weight"
            for c in CONVS
            if c != "layer3.1"
            for name in ("lora_A.default", "lora_B.default", "lora_magnitude_vector.default")
        ],
    ),
    "lora on a transformer": (
        Vit,
        partial(lora.prepare, stages=["layer4"], rank=2),
        [
            f"layer4.block.{layer}.lora_{ab}.default.weight"
            for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
            for ab in "AB"
        ],
    ),
    "svf on a transformer": (
        Vit,
        partial(svf.prepare, stages=["layer4"]),
        [f"layer4.block.{layer}.s" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")],
    ),
    "vpt, gated": (
        Vit,
        partial(vpt.prepare, stages=ALL, gate=True),
        [f"{stage}.block.{name}" for stage in ALL for name in ("prompts", "prompt_gate")],
    ),
    "vpt, shallow and gated": (
        Vit,
        partial(vpt.prepare, deep=False, gate=True),
        ["layer1.block.prompts", *(f"layer{i}.block.prompt_gate" for i in (1, 2, 3, 4))],
    ),
}


@pytest.fixture(
    params=[
        pytest.param(name, marks=[needs_peft] if name.startswith(("lora", "dora")) else [])
        for name in STRATEGIES
    ]
)
def strategy(request):
    return STRATEGIES[request.param]


def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def trained(network):
    return {name for name, p in network.named_parameters() if p.requires_grad}


def count(network):
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def disturb(network):
    """Move all that trains, as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator)


def same(a, b, gap=1e-5):
    for got, want in zip(a, b, strict=True):
        assert float((got - want).norm().detach()) <= gap * float(want.norm().detach())


def different(a, b):
    assert float((a[-1] - b[-1]).norm().detach()) > 1e-3 * float(b[-1].norm().detach())


def test_before_training_the_backbone_computes_what_it_did(strategy):
    build, prepare, _ = strategy
    network, x = build(), images()
    with torch.no_grad():
        expected = network(x)
    prepare(network)
    same(network.train()(x), expected)
    with torch.no_grad():
        same(network.eval()(x), expected)


def test_what_the_strategy_names_trains_and_gets_a_gradient_and_nothing_else_does(strategy):
    build, prepare, names = strategy
    network = build()
    prepare(network)
    assert trained(network) == set(names)
    if names:
        network(images())[-1].square().sum().backward()
    assert {name for name, p in network.named_parameters() if p.grad is not None} == set(names)


def test_a_second_call_changes_nothing(strategy):
    build, prepare, names = strategy
    network = build()
    prepare(network)
    disturb(network)
    before = copy.deepcopy(network.state_dict())
    prepare(network)
    assert trained(network) == set(names)
    assert list(network.state_dict()) == list(before)
    assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())


def test_a_checkpoint_brings_the_trained_backbone_back(strategy):
    build, prepare, _ = strategy
    network, other = build(), build()
    for p in other.parameters():  # other weights, factors and prompts, until loaded
        nn.init.normal_(p)
    for each in (network, other):
        prepare(each)
    disturb(network)
    x = images()
    different(other(x), network(x))
    other.load_state_dict(copy.deepcopy(network.state_dict()))
    same(other(x), network(x), gap=1e-6)
    same(copy.deepcopy(network)(x), network(x), gap=1e-6)


@pytest.mark.parametrize(
    ("name", "merge"),
    [
        ("svf exp", merge_svf),
        ("svf both", merge_svf),
        ("svf usv", merge_svf),
        ("rotation", merge_svf),
        ("scale output", export.merge),
        ("scale input tap", export.merge),
        ("scale input", export.merge),
        pytest.param("lora", lora.merge, marks=needs_peft),
        pytest.param("dora", lora.merge, marks=needs_peft),
        pytest.param("lora on a transformer", lora.merge, marks=needs_peft),
    ],
)
def test_merging_gives_the_plain_network_with_what_was_trained(name, merge):
    build, prepare, _ = STRATEGIES[name]
    network, x = build(), images()
    untrained = network(x)
    prepare(network)
    disturb(network)
    expected = network(x)
    different(expected, untrained)
    merge(network)
    same(network(x), expected, gap=1e-5)
    plain = build()
    assert [type(m) for m in network.modules()] == [type(m) for m in plain.modules()]
    assert set(network.state_dict()) == set(plain.state_dict())


# ---- how many numbers train: layers 2 to 4 of the paper's backbones


@pytest.fixture
def factors_of_zeros(monkeypatch):
    """Factors of the right shape at no cost: counting needs no decomposition."""

    def decompose(weight, groups=1):
        matrix = weight.to("meta").reshape(groups, weight.shape[0] // groups, -1)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return tuple(torch.empty_like(t.flatten(0, 1)) for t in (u, s, vh))

    monkeypatch.setattr("svf_lightning.svf.layer.decompose", decompose)


@pytest.mark.parametrize(
    ("prepare", "r50", "r101", "vgg"),
    [
        (partial(full.prepare, stages=ALL), 23_232_512, 42_172_416, 14_450_688),
        (partial(full.prepare, stages=ALL, kernels=["1x1"]), 12_025_856, 20_938_752, None),
        (partial(full.prepare, stages=ALL, kernels=["3x3"]), 11_206_656, 21_233_664, 14_450_688),
        (svf.prepare, 12_544, 25_600, 3_840),
        (partial(svf.prepare, parametrization="exp"), 12_544, 25_600, 3_840),
        (partial(svf.prepare, parametrization="both"), 25_088, 51_200, 7_680),
        (partial(svf.prepare, kernels=["1x1"]), 8_960, 17_664, None),
        (partial(svf.prepare, kernels=["3x3"]), 3_584, 7_936, 3_840),
        (partial(svf.prepare, train=["u"]), 10_223_616, 16_908_288, 1_769_472),
        (partial(svf.prepare, train=["v"]), 18_120_704, 33_718_272, 14_450_688),
        (partial(svf.prepare, train=["u", "s", "v"]), 28_356_864, 50_652_160, 16_224_000),
        (bn.prepare, 50_176, 102_400, 7_680),
        (partial(bn.prepare, train=["weight"]), 25_088, 51_200, 3_840),
        (partial(bn.prepare, train=["bias"]), 25_088, 51_200, 3_840),
        (partial(bn.prepare, svf=True), 62_720, 128_000, 11_520),
        (partial(channel_scale.prepare, side="output"), 25_088, 51_200, 3_840),
        (channel_scale.prepare, 50_176, 111_104, 31_104),
        (partial(channel_scale.prepare, side="input"), 21_504, 47_616, 3_456),
    ],
)
def test_as_many_numbers_train_as_the_paper_counts(factors_of_zeros, prepare, r50, r101, vgg):
    for build, expected in ((resnet50, r50), (resnet101, r101), (vgg16, vgg)):
        with torch.device("meta"):
            network = build(weights=None)
        if build is vgg16:  # its convolutions have biases, which the paper does not count
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    module.bias = None
        if expected is None:
            with pytest.raises(ValueError, match="no layer of layer2, layer3, layer4 has a kernel of 1x1"):
                prepare(network)
        else:
            prepare(network)
            assert count(network) == expected


# ---- what each strategy computes, by its formula


def test_channel_scales_are_rows_or_columns_of_the_kernel_matrix():
    conv, t = nn.Conv2d(3, 4, 3, bias=False), torch.arange(1.0, 28)
    matrix = conv.weight.detach().flatten(1)
    for side, expected in (
        ("output", torch.diag(t[:4]) @ matrix),
        ("input_tap", matrix @ torch.diag(t)),
        ("input", matrix @ torch.diag(t[:3].repeat_interleave(9))),
    ):
        net = nn.ModuleDict({"layer4": copy.deepcopy(conv)})
        channel_scale.prepare(net, ["layer4"], side)
        with torch.no_grad():
            scale = net["layer4"].parametrizations.weight[0].t
            scale.copy_(t[: scale.numel()].view(scale.shape))
        torch.testing.assert_close(net["layer4"].weight.flatten(1), expected)


def test_input_scales_of_a_grouped_convolution_scale_the_inputs():
    conv, x = nn.Conv2d(4, 6, 1, groups=2, bias=False), torch.randn(1, 4, 5, 5)
    t = torch.tensor([1.0, -2.0, 3.0, 0.5])
    net = nn.ModuleDict({"layer4": copy.deepcopy(conv)})
    channel_scale.prepare(net, ["layer4"], "input")
    with torch.no_grad():
        net["layer4"].parametrizations.weight[0].t.copy_(t.view(4, 1, 1))
    torch.testing.assert_close(net["layer4"](x), conv(x * t.view(1, 4, 1, 1)))


def test_rotation_is_orthogonal_seeded_and_the_formula():
    conv, x = nn.Conv2d(3, 5, 3), torch.randn(1, 3, 6, 6)
    layers = []
    for seed in (0, 0, 1):
        net = nn.ModuleDict({"layer4": copy.deepcopy(conv)})
        rotation.prepare(net, ["layer4"], seed)
        layers.append(net["layer4"])
    r, t = layers[0].u, torch.linspace(-1, 2, 5)
    torch.testing.assert_close(r @ r.T, torch.eye(5), atol=1e-6, rtol=0)
    assert torch.equal(r, layers[1].u)
    assert not torch.allclose(r, layers[2].u)
    with torch.no_grad():
        layers[0].s.copy_(t)
    kernel = (r @ torch.diag(t) @ r.T @ conv.weight.flatten(1)).view_as(conv.weight)
    torch.testing.assert_close(layers[0](x), F.conv2d(x, kernel, conv.bias), atol=1e-5, rtol=1e-5)


def test_haar_rotations_favour_no_direction():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([rotation.haar(3, generator) for _ in range(4000)])
    # Of a uniform orthogonal matrix every entry has mean 0 and variance 1 / 3; without the fix of signs
    # LAPACK's has a diagonal of one sign.
    assert draws.mean(0).abs().max() < 0.05
    torch.testing.assert_close(draws.square().mean(0), torch.full((3, 3), 1 / 3).double(), atol=0.03, rtol=0)


@pytest.mark.parametrize("train", ["s", "kernel"])
def test_bounding_leaves_all_singular_values_of_what_trains_within_the_band(train):
    network = small()
    svb.prepare(network, ALL, train)
    frozen_kernel = network.layer1[0].weight.clone()
    disturb(network)
    svb.bound(network, epsilon=0.25)
    assert torch.equal(network.layer1[0].weight, frozen_kernel)
    for name in CONVS:
        layer = network.get_submodule(name)
        for kernel in layer.weight.flatten(1).chunk(layer.groups):
            values = torch.linalg.svdvals(kernel)
            assert values.min() > 0.8 - 1e-5
            assert values.max() < 1.25 + 1e-5


def test_clipping_singular_values_cuts_the_large_ones_and_leaves_the_others():
    network = small()
    spectral_clip.prepare(network, ALL, "s")
    before = singular_values(network)
    spectral_clip.clip(network, limit=0.7)
    for name, values in singular_values(network).items():
        assert torch.equal(values, before[name].clamp(max=0.7))
    assert any((values > 0.7).any() for values in before.values())


def operator(kernel, size):
    """The matrix of a circular convolution, made by sending every unit map through torch's own."""
    _, inputs, k, _ = kernel.shape
    units = torch.eye(inputs * size * size, dtype=kernel.dtype).view(-1, inputs, size, size)
    return F.conv2d(F.pad(units, (0, k - 1, 0, k - 1), "circular"), kernel).flatten(1).T


def test_singular_values_of_the_operator_are_those_of_its_explicit_matrix():
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = spectral_clip.operator_singular_values(kernel, 5).sort().values
    torch.testing.assert_close(ours, torch.linalg.svdvals(operator(kernel, 5)).sort().values)


@pytest.mark.parametrize("size", [5, 6])
def test_clipping_the_operator_is_clipping_its_explicit_matrix(size):
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(operator(kernel, size), full_matrices=False)
    assert s.max() > 4 > s.min()
    ours = spectral_clip.clip_operator(kernel, 4.0, size)
    assert ours.shape == (3, 2, size, size)
    torch.testing.assert_close(operator(ours, size), u @ torch.diag(s.clamp(max=4.0)) @ vh)


def test_clipping_cuts_the_norm_of_every_kernel_that_trains_whatever_its_kind():
    network = small()
    spectral_clip.prepare(network)
    before = copy.deepcopy(network)
    spectral_clip.clip(network, limit=0.5, size=8)
    for name in CONVS:
        old, new = before.get_submodule(name), network.get_submodule(name)
        for a, b in zip(old.weight.chunk(old.groups), new.weight.chunk(new.groups), strict=True):
            old_norm, new_norm = (spectral_clip.operator_singular_values(k, 8).max() for k in (a, b))
            assert old_norm > 0.5
            assert new_norm < 0.5 + 0.5 * (old_norm - 0.5)  # cutting back to 3x3 gives some of it back
    assert torch.equal(network.layer1[0].weight, before.layer1[0].weight)


def test_a_clip_that_cuts_nothing_changes_nothing():
    network = small()
    spectral_clip.prepare(network)
    x = images()
    expected = network(x)
    spectral_clip.clip(network, limit=100.0, size=4)
    same(network(x), expected)


def test_deep_prompts_join_the_attention_of_their_block_and_leave_behind_it():
    network, plain, x = Vit(), Vit(), images()
    vpt.prepare(network, ["layer3"], count=3)
    with torch.no_grad():
        state = plain.layer2(plain.layer1(plain.layer0(x)))
        tokens = torch.cat([state[1], state[0].flatten(2).mT], dim=1)
        prompts = network.layer3.block.prompts.expand(2, -1, -1)
        joined = plain.layer3.block(torch.cat([tokens, prompts], dim=1))  # order does not matter
        expected = joined[:, 1:17].mT.unflatten(2, (4, 4))
        torch.testing.assert_close(network(x)[3], expected)
        different(network(x), plain(x))


def test_shallow_prompts_pass_through_all_blocks_between_the_first_and_the_last():
    network, plain, x = Vit(), Vit(), images()
    vpt.prepare(network, ["layer1", "layer2"], count=3, deep=False)
    with torch.no_grad():
        patches, token = plain.layer0(x)
        prompts = network.layer1.block.prompts.expand(2, -1, -1)
        tokens = torch.cat([prompts, token, patches.flatten(2).mT], dim=1)
        tokens = plain.layer2.block(plain.layer1.block(tokens))[:, 3:]
        torch.testing.assert_close(network(x)[2], tokens[:, 1:].mT.unflatten(2, (4, 4)))
        torch.testing.assert_close(network(x)[3], plain.layer3((network(x)[2], tokens[:, :1]))[0])


def test_a_gate_weighs_prompts_in_the_softmax():
    network, open_gate, x = Vit(), Vit(), images()
    vpt.prepare(open_gate, ALL, gate=False)
    vpt.prepare(network, ALL, gate=True)
    with torch.no_grad():
        for stage in ALL:
            network.get_submodule(stage).block.prompt_gate.fill_(1.0)
        same(network(x), open_gate(x))


@needs_peft
def test_the_correction_of_a_dilated_convolution_looks_where_the_convolution_looks():
    network = small()
    lora.prepare(network, ["layer2"], rank=2, alpha=4)
    adapter = network.layer2[0]
    disturb(network)
    a, b = adapter.lora_A.default.weight, adapter.lora_B.default.weight
    plain = adapter.get_base_layer()
    kernel = plain.weight + 2 * torch.einsum("orxy,rijk->oijk", b, a)
    x = torch.randn(1, 6, 9, 9)
    expected = F.conv2d(x, kernel, plain.bias, padding=2, dilation=2)
    torch.testing.assert_close(adapter(x), expected, atol=1e-5, rtol=1e-5)


# ---- what is refused


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (partial(full.prepare, stages=["layer5"]), "no 'layer5'; it has layer0, layer1"),
        (partial(full.prepare, stages=["layer4"], kernels=["1x1"]), "kernel of 1x1; there are 3x3"),
        (partial(svf.prepare, stages=["layer4"], kernels=["5x5"]), "kernel of 5x5; there are 3x3"),
        (partial(svf.prepare, train=["t"]), "list of factors from u, s, v; got \\['t'\\]"),
        (partial(svf.prepare, train=[]), "list of factors"),
        (partial(svf.prepare, train=["u"], parametrization="exp"), "with 's' in train"),
        (partial(svf.prepare, parametrization="log"), "'s', 'exp' or 'both'"),
        (partial(bn.prepare, train=["mean"]), "list of 'weight', 'bias' or both; got \\['mean'\\]"),
        (partial(channel_scale.prepare, side="tap"), "one of output, input_tap, input; got 'tap'"),
        (partial(svb.prepare, train="u"), "'s' or 'kernel', got 'u'"),
        (partial(spectral_clip.prepare, train="u"), "'s' or 'kernel', got 'u'"),
        (vpt.prepare, "'layer1' holds no vision transformer block, which vpt needs"),
        pytest.param(
            partial(lora.prepare, stages=["layer3.1"]), "hold grouped convolutions only", marks=needs_peft
        ),
    ],
)
def test_what_does_not_fit_the_network_is_refused_by_name_and_leaves_it_alone(prepare, message):
    network = small()
    with pytest.raises(ValueError, match=message):
        prepare(network)
    assert set(network.state_dict()) == set(small().state_dict())
    assert count(network) == sum(p.numel() for p in network.parameters())


def test_a_network_without_batch_norm_is_refused_by_bn():
    with pytest.raises(ValueError, match=r"'layer2' holds no BatchNorm .* than bn"):
        bn.prepare(vgg16(weights=None, batch_norm=False))


def test_a_network_without_biases_is_refused_by_bias():
    net = nn.ModuleDict({"layer2": nn.Conv2d(3, 4, 1, bias=False)})
    with pytest.raises(ValueError, match="'layer2' has no bias"):
        bias.prepare(net, ["layer2"])


def test_a_kernel_larger_than_the_map_is_refused():
    with pytest.raises(ValueError, match="size is 2"):
        spectral_clip.clip_operator(torch.ones(1, 1, 3, 3), 1.0, 2)


def test_peft_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'svf-lightning\[peft\]'"):
        lora.prepare(small())
