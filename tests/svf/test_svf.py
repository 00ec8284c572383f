"""The factored layer: exact before training, right gradients, free in evaluation, whole in checkpoints."""

import copy
import io
import pickle

import pytest
import timm
import torch
from timm.layers import Conv2dSame, StdConv2d
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from svf_lightning.finetune.svf import prepare
from svf_lightning.svf.decompose import decompose
from svf_lightning.svf.layer import SVFLayer, from_factors
from svf_lightning.svf.network import (
    apply_svf,
    load_svf_state_dict,
    merge_svf,
    singular_values,
    svf_state_dict,
)
from tests.golden import cases, fill

# name -> (layer, input shape, full rank); odd sizes catch off-by-one padding
KINDS = {
    "1x1 expand": (lambda: nn.Conv2d(4, 9, 1), (2, 4, 7, 5), 4),
    "1x1 reduce, stride 2": (lambda: nn.Conv2d(9, 4, 1, stride=2, bias=False), (2, 9, 7, 5), 4),
    "3x3 stride 2": (lambda: nn.Conv2d(3, 32, 3, stride=2, padding=1), (2, 3, 9, 8), 27),
    "3x3 dilated": (lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, bias=False), (2, 4, 9, 8), 6),
    "1x3": (lambda: nn.Conv2d(4, 6, (1, 3), padding=(0, 1)), (2, 4, 5, 6), 6),
    "one output": (lambda: nn.Conv2d(4, 1, 3), (2, 4, 5, 6), 1),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, padding=1), (2, 8, 6, 5), 12),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1, stride=2, bias=False), (2, 6, 7, 6), 6),
    "depthwise with bias": (lambda: nn.Conv2d(6, 6, 5, groups=6, padding=2), (2, 6, 7, 6), 6),
    "depthwise, two outputs a channel": (lambda: nn.Conv2d(3, 6, 3, groups=3), (2, 3, 7, 6), 6),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 7, 6), 6),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7, 6), 6),
    "same, even kernel": (lambda: nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 7, 6), 6),
    "same, replicate": (
        lambda: nn.Conv2d(4, 6, (4, 3), padding="same", padding_mode="replicate"),
        (2, 4, 7, 6),
        6,
    ),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 6), 6),
    "timm same": (lambda: Conv2dSame(4, 6, 3, stride=2), (2, 4, 8, 7), 6),
    "timm same, depthwise": (lambda: Conv2dSame(4, 4, 5, stride=2, groups=4), (2, 4, 8, 7), 4),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 7, 6), 6),
    "1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 9), 6),
    "3d": (lambda: nn.Conv3d(2, 5, 3, padding=1), (2, 2, 5, 4, 3), 5),
    "transposed": (lambda: nn.ConvTranspose2d(6, 3, 3, stride=2, padding=1), (2, 6, 5, 4), 6),
    "transposed, padded output": (
        lambda: nn.ConvTranspose2d(4, 5, 4, stride=3, output_padding=(1, 2), dilation=2, bias=False),
        (2, 4, 5, 4),
        4,
    ),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), (2, 6, 4, 3), 6),
    "transposed, depthwise": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), (2, 4, 4, 3), 4),
    "transposed, unbatched": (lambda: nn.ConvTranspose2d(4, 2, 3), (4, 5, 6), 4),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 2, 3, stride=2), (2, 4, 5), 4),
    "transposed 3d": (lambda: nn.ConvTranspose3d(3, 2, 2, stride=2), (1, 3, 3, 2, 2), 3),
    "linear": (lambda: nn.Linear(5, 7), (2, 3, 5), 5),
    "linear, wide": (lambda: nn.Linear(9, 4, bias=False), (3, 9), 4),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request):
    torch.manual_seed(0)
    build, shape, rank = request.param
    return build(), torch.randn(shape), rank


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_before_training_a_factored_layer_computes_what_the_original_did(kind, dtype, gap):
    plain, x, rank = kind
    plain, x = plain.to(dtype), x.to(dtype)
    layer = apply_svf(copy.deepcopy(plain))

    assert layer.s.shape == (rank,)
    assert layer.s.dtype == dtype
    assert relative(layer(x), plain(x)) < gap
    with torch.no_grad():
        assert relative(layer(x), plain(x)) < gap
    assert relative(layer.weight, plain.weight) < gap


@pytest.mark.parametrize("rank", [None, 1])
def test_gradients_are_those_of_autograd_through_the_rebuilt_kernel(kind, rank):
    plain, x, _ = kind
    plain, x = plain.double(), x.double().requires_grad_()
    layer = apply_svf(copy.deepcopy(plain), rank=rank)
    with torch.no_grad():
        layer.s[0] = -0.3  # trained values may change sign, or vanish
        layer.s[-1] = 0.0
    wanted = [x, layer.s] + ([] if layer.bias is None else [layer.bias])
    weight, bias = layer.weight, {} if layer.bias is None else {"bias": layer.bias}
    expected = torch.func.functional_call(plain, {"weight": weight, **bias}, (x,))
    direction = torch.randn_like(expected)

    ours = torch.autograd.grad(layer(x), wanted, direction)

    for got, want in zip(ours, torch.autograd.grad(expected, wanted, direction), strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("rank", [None, 1])
def test_gradients_agree_with_finite_differences(kind, rank):
    plain, x, _ = kind
    layer = apply_svf(plain.double(), rank=rank)

    def run(x, s):
        return torch.func.functional_call(layer, {"s": s}, (x,))

    assert torch.autograd.gradcheck(run, (x.double().requires_grad_(), layer.s), fast_mode=True)


def test_only_the_singular_values_get_a_gradient_where_the_input_wants_none():
    layer = apply_svf(nn.Conv2d(3, 4, 3))
    layer(torch.randn(1, 3, 5, 5)).sum().backward()
    assert layer.s.grad is not None
    assert layer.u.grad is None
    assert layer.vh.grad is None


def test_one_feature_map_is_kept_per_factored_convolution():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    layer, x, kept = apply_svf(conv), torch.randn(1, 8, 16, 16, requires_grad=True), []

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)

    assert [tuple(t.shape) for t in kept if t.numel() > layer.vh.numel()] == [(1, 8, 16, 16)]


def test_a_widening_1x1_layer_keeps_the_input_that_a_relu_keeps_anyway():
    layer, kept = apply_svf(nn.Conv2d(8, 32, 1)), []
    x = torch.randn(1, 8, 16, 16, requires_grad=True).relu()

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)

    assert [t.data_ptr() for t in kept if t.numel() > layer.u.numel()] == [x.data_ptr()]


def test_factors_lie_as_convolutions_read_them():
    for shape in ((8, 4, 3, 3), (4, 8, 1, 1)):  # either branch of the decomposition
        layer = SVFLayer(nn.Conv2d(shape[1], shape[0], shape[2]))
        assert layer.u.is_contiguous()
        assert layer.vh.is_contiguous()


def test_factors_that_train_themselves_get_their_gradients():
    layer = apply_svf(nn.Conv2d(3, 4, 3).double())
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    layer.u.requires_grad_(True)
    layer.vh.requires_grad_(True)
    wanted = [layer.u, layer.s, layer.vh]

    ours = torch.autograd.grad(layer(x).square().sum(), wanted)

    expected = torch.autograd.grad(F.conv2d(x, layer.weight, layer.bias).square().sum(), wanted)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("depthwise", [True, False])
def test_an_optimizer_step_moves_the_output_in_either_mode(training, depthwise):
    torch.manual_seed(0)
    layer = apply_svf(nn.Conv2d(4, 4, 3, groups=4 if depthwise else 1)).train(training)
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        layer(x)  # fills the cache that the step has to outdate

    layer(x).square().sum().backward()
    torch.optim.SGD([layer.s], 0.1).step()

    with torch.no_grad():
        torch.testing.assert_close(
            layer(x), F.conv2d(x, layer.weight, layer.bias, groups=layer.groups), atol=1e-5, rtol=1e-5
        )


def test_evaluation_is_bit_stable_and_one_plain_convolution():
    torch.manual_seed(0)
    layer = apply_svf(nn.Conv2d(4, 8, 3)).eval()
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        first, second = layer(x), layer(x)
        merged = merge_svf(copy.deepcopy(layer))(x)
    assert torch.equal(first, second)
    assert torch.equal(first, merged)


def test_the_kernel_is_rebuilt_only_when_a_factor_changed(monkeypatch):
    layer, x, builds = apply_svf(nn.Conv2d(2, 3, 1)).eval().requires_grad_(False), torch.ones(1, 2, 2, 2), []
    monkeypatch.setattr(
        "svf_lightning.svf.layer._merged_weight", lambda la: builds.append(1) or la.weight.detach()
    )
    layer(x)
    layer(x)
    assert len(builds) == 1
    layer.s.add_(1)
    layer(x)
    assert len(builds) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.load_state_dict({**layer.state_dict(), "s": layer.s * 2}),
        lambda layer: layer.load_state_dict({**layer.state_dict(), "s": layer.s * 2}, assign=True),
        lambda layer: (layer.s.data.mul_(2), layer.eval()),
        lambda layer: setattr(layer, "s", nn.Parameter(layer.s.detach() * 2)),
        lambda layer: layer.vh.mul_(2),
        lambda layer: layer.double().float().s.mul_(2),
    ],
    ids=["load", "load by assignment", "write to data, then eval", "new parameter", "new vh", "move"],
)
def test_no_change_of_the_factors_is_overlooked_in_evaluation(change):
    layer = apply_svf(nn.Conv2d(3, 4, 1, bias=False)).eval()
    x = torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        before = layer(x)
        change(layer)
        torch.testing.assert_close(layer(x), 2 * before)


def test_a_kernel_built_in_inference_mode_serves_a_later_backward():
    layer = apply_svf(nn.Conv2d(3, 4, 1)).eval()
    layer.s.requires_grad_(False)
    x = torch.randn(1, 3, 5, 5)
    with torch.inference_mode():
        layer(x)
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0, :, 0, 0], layer.weight.sum(0).flatten())


def test_bfloat16_autocast_runs_and_is_close():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16))
    net, x = apply_svf(copy.deepcopy(plain)), torch.randn(2, 8, 12, 12)
    net(x).square().mean().backward()
    expected = [layer.s.grad.clone() for layer in (net[0], net[2])]
    net.zero_grad()

    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
        apply_svf(nn.Conv2d(4, 4, 3))  # decomposing inside autocast stays exact, or raises
    y.float().square().mean().backward()

    assert y.dtype == torch.bfloat16
    assert relative(y.float(), plain(x)) < 2e-2
    for layer, want in zip((net[0], net[2]), expected, strict=True):
        assert layer.s.grad.dtype == torch.float32
        assert relative(layer.s.grad, want) < 3e-2
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert relative(net(x).float(), plain(x)) < 2e-2


def test_channels_last_input_gives_the_same_and_stays_channels_last():
    torch.manual_seed(0)
    net = apply_svf(nn.Conv2d(8, 8, 3, padding=1))
    x = torch.randn(2, 8, 6, 6)
    last = x.clone(memory_format=torch.channels_last).requires_grad_()
    first = x.clone().requires_grad_()
    y = net(last)
    y.square().sum().backward()
    net(first).square().sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last.grad, first.grad)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_compiled_network_is_one_graph_and_trains_alike(rank):
    torch.manual_seed(0)
    net = apply_svf(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4)), rank=rank)
    x = torch.randn(1, 3, 9, 9)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(net(x).square().sum(), [net[0].s, net[2].s])
    got = torch.autograd.grad(compiled(x).square().sum(), [net[0].s, net[2].s])
    torch.testing.assert_close(got, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize("rank", [None, 2])
def test_an_evaluated_network_is_exported_with_any_batch_size(rank):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(2), nn.Linear(25, 3)
    )
    apply_svf(net, rank=rank).eval().requires_grad_(False)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(net, (torch.randn(2, 3, 9, 9),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 3, 9, 9)
    torch.testing.assert_close(exported.module()(x), net(x), atol=1e-5, rtol=1e-5)


def small_task():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 1)), torch.randn(2, 3, 7, 7)


def train_on_half(rank, folder):
    """One process of two: a backward pass on its half of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net, x = small_task()
    net = nn.parallel.DistributedDataParallel(apply_svf(net))
    net(x[rank : rank + 1]).square().mean().backward()
    torch.save([net.module[i].s.grad for i in (0, 2)], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_distributed_processes_get_the_gradient_of_the_whole_batch(tmp_path):
    net, x = small_task()
    torch.multiprocessing.spawn(train_on_half, (tmp_path,), nprocs=2)

    apply_svf(net)(x).square().mean().backward()
    for rank in (0, 1):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(got, [net[0].s.grad, net[2].s.grad])


# ---- the decomposition


@pytest.mark.parametrize(("shape", "groups"), [((8, 3, 3, 3), 1), ((4, 32), 1), ((12, 2, 3, 3), 4)])
def test_factors_are_orthonormal_and_values_descend_within_each_group(shape, groups):
    torch.manual_seed(0)
    factors = decompose(torch.randn(shape, dtype=torch.float64), groups)
    for u, s, vh in zip(*(factor.chunk(groups) for factor in factors), strict=True):
        torch.testing.assert_close(u.T @ u, torch.eye(len(s), dtype=torch.float64))
        torch.testing.assert_close(vh @ vh.T, torch.eye(len(s), dtype=torch.float64))
        assert (s.diff() <= 0).all()
        assert (s >= 0).all()


def test_a_kernel_of_zeros_or_of_low_rank_is_no_obstacle():
    conv = nn.Conv2d(4, 6, 3)
    with torch.no_grad():
        conv.weight[:3] = 0
        conv.weight[4] = conv.weight[3]
    layer = apply_svf(copy.deepcopy(conv))
    torch.testing.assert_close(layer.weight, conv.weight, atol=1e-6, rtol=0)
    nn.init.zeros_(conv.weight)
    assert singular_values(apply_svf(conv))[""].eq(0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_with_nan_or_infinity_is_refused_by_the_name_of_its_layer(bad):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1)))
    with torch.no_grad():
        net[1][0].weight[0, 0] = bad
    with pytest.raises(ValueError, match=r"^1\.0: .*NaN or infinity"):
        apply_svf(net)
    assert type(net[0]) is nn.Conv2d  # refused before anything was replaced


def test_a_decomposition_that_does_not_give_the_weight_back_is_refused(monkeypatch):
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **k: svd(1.001 * m, **k))
    with pytest.raises(ValueError, match=r"0: U diag\(s\) V\^T differs from the weight by 1\.0e-03"):
        apply_svf(nn.Sequential(nn.Linear(3, 4)))


class OddConvolution(nn.ConvTranspose2d):
    def forward(self, x, output_size=None):
        return 2 * super().forward(x, output_size)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (OddConvolution(3, 4, 3), "OddConvolution computes its output in its own way"),
        (StdConv2d(3, 4, 3), "StdConv2d computes its output in its own way"),
        (nn.LazyConv2d(4, 3), "has no weight yet"),
        (parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), "itself computed"),
        (nn.Conv2d(3, 4, 3, dtype=torch.complex64), "got torch.complex64"),
    ],
    ids=["own forward", "standardised", "lazy", "weight norm", "complex"],
)
def test_a_layer_that_factors_would_change_is_refused_by_name(layer, reason):
    with pytest.raises(ValueError, match=f"^0: .*{reason}"):
        apply_svf(nn.Sequential(layer))


# ---- only the largest values


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_at_a_lower_rank_a_layer_still_computes_what_the_original_did(kind, dtype, gap):
    plain, x, full = kind
    plain, x = plain.to(dtype), x.to(dtype)
    groups = getattr(plain, "groups", 1)
    layer = apply_svf(copy.deepcopy(plain), rank=1)

    assert layer.s.shape == (groups,)
    assert (layer.rest is None) == (full == groups)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            assert relative(layer(x), plain(x)) < gap
    assert relative(merge_svf(layer).weight, plain.weight) < gap


def test_the_largest_values_train_and_the_others_stay_in_the_kernel():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3).double()
    layer = apply_svf(copy.deepcopy(conv), rank=2)
    torch.testing.assert_close(layer.s, torch.linalg.svdvals(conv.weight.flatten(1))[:2])
    with torch.no_grad():
        layer.s.zero_()
    left = torch.linalg.svdvals(layer.weight.flatten(1))
    torch.testing.assert_close(left[:4], torch.linalg.svdvals(conv.weight.flatten(1))[2:])


def test_at_a_lower_rank_a_training_step_costs_feature_maps_of_that_many_channels():
    layer, x = apply_svf(nn.Conv2d(8, 8, 3, padding=1), rank=2), torch.randn(1, 8, 16, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        layer(x)
    assert [shape for shape in kept if shape[-1] == 16] == [(1, 2, 16, 16)]


@pytest.mark.parametrize("rank", [0, 7])
def test_a_rank_that_the_layer_does_not_have_is_refused_by_name(rank):
    with pytest.raises(ValueError, match=f"^0: rank={rank} is not between 1 and 6"):
        apply_svf(nn.Sequential(nn.Conv2d(8, 6, 3)), rank=rank)


def test_in_a_grouped_layer_the_rank_counts_per_group_and_a_group_with_fewer_gives_all():
    grouped = apply_svf(nn.Conv2d(8, 12, 3, groups=4), rank=2)
    assert grouped.s.shape == (8,)
    for values in grouped.s.chunk(4):
        assert values[0] > values[1] > 0
    assert apply_svf(nn.Conv2d(6, 6, 3, groups=6), rank=30).s.shape == (6,)


def test_a_layer_factored_at_another_rank_is_not_taken_for_the_one_asked_for():
    net = apply_svf(nn.Sequential(nn.Conv2d(8, 6, 3)))
    with pytest.raises(
        ValueError, match=r"^0: is factored already, with 6 values and not 2; merge_svf first"
    ):
        apply_svf(net, rank=2)
    net = apply_svf(merge_svf(net), rank=2)
    layer = net[0]
    assert apply_svf(net, rank=2)[0] is layer


def test_a_lower_rank_survives_a_checkpoint_bfloat16_and_padding_by_hand():
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")
    layer, x = apply_svf(copy.deepcopy(plain), rank=2), torch.randn(2, 4, 7, 6)
    with torch.no_grad():
        layer.s.mul_(2)
    other = apply_svf(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), rank=2)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(layer(x).float(), layer(x.double().float())) < 2e-2
        layer(x).float().sum().backward()
    assert layer.s.grad.dtype == torch.float32


# ---- the values alone


def test_the_values_alone_bring_back_what_was_trained():
    trained, fresh = apply_svf(network(), ["layer2"]), apply_svf(network(), ["layer2"])
    with torch.no_grad():
        trained["layer2"][0].s.mul_(-1.5)
    state = svf_state_dict(trained)
    assert {name: len(value) for name, value in state.items()} == {"layer2.0.s": 6}
    load_svf_state_dict(fresh, state)
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(fresh["layer2"][0](x), trained["layer2"][0](x))


def test_the_values_of_a_single_layer_have_its_own_names():
    layer = apply_svf(nn.Linear(3, 2))
    assert list(svf_state_dict(layer)) == ["s"]
    load_svf_state_dict(layer, {"s": torch.tensor([2.0, 1.0])})
    assert layer.s.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s | {"layer2.O.s": s.pop("layer2.0.s")}, "'layer2.O.s' is no value .* 'layer2.0.s'"),
        (lambda s: {"layer2.0.s": s["layer2.0.s"]}, "there is no 'layer20.0.s'"),
        (lambda s: s | {"layer2.0.s": torch.ones(5)}, r"'layer2.0.s' has shape \(5,\), here it has \(6,\)"),
        (lambda s: s | {"layer2.0.s": torch.full((6,), torch.nan)}, "'layer2.0.s' holds NaN"),
    ],
    ids=["unknown", "missing", "shape", "nan"],
)
def test_values_that_do_not_fit_are_refused_by_name_and_change_nothing(change, reason):
    net = apply_svf(network(), ["layer2", "layer20"])
    before = {name: value.clone() for name, value in svf_state_dict(net).items()}
    state = change({name: value + 1 for name, value in before.items()})
    with pytest.raises(ValueError, match=reason):
        load_svf_state_dict(net, state)
    torch.testing.assert_close(svf_state_dict(net), before, rtol=0, atol=0)


def test_values_for_a_network_without_factors_are_refused():
    with pytest.raises(ValueError, match="call apply_svf first"):
        load_svf_state_dict(network(), {"layer2.0.s": torch.ones(6)})


# ---- apply, merge, prepare


def network():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "layer1": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
            "layer2": nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)),
            "layer20": nn.Sequential(nn.Conv2d(6, 5, 1)),
            "relu": nn.ReLU(),
        }
    )


def test_only_the_named_layers_are_replaced_and_a_prefix_is_no_name():
    net = network()
    assert apply_svf(net, ["layer2"]) is net
    assert list(singular_values(net)) == ["layer2.0"]
    assert set(net["layer2"].state_dict()) >= {"0.u", "0.s", "0.vh"}


def test_a_second_call_changes_nothing():
    net = apply_svf(network())
    with torch.no_grad():
        net["layer2"][0].s.mul_(2)
    before, layer = copy.deepcopy(net.state_dict()), net["layer2"][0]
    apply_svf(net)
    assert net["layer2"][0] is layer
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_an_unknown_layer_is_refused_with_names_that_come_near():
    with pytest.raises(ValueError, match=r"'layr2'; did you mean 'layer2'"):
        apply_svf(network(), ["layr2"])
    with pytest.raises(ValueError, match=r"did you mean .*'backbone\.layer2'"):
        apply_svf(nn.ModuleDict({"backbone": network()}), ["layer2"])


def test_a_name_that_holds_nothing_to_factor_is_refused():
    with pytest.raises(ValueError, match="'relu' holds no convolution"):
        apply_svf(network(), ["relu"])


def test_a_layer_with_several_names_becomes_one_factored_layer_under_all_of_them():
    conv = nn.Conv2d(3, 3, 1)
    net = nn.ModuleDict({"a": nn.Sequential(conv, conv), "b": conv})
    apply_svf(net, ["a"])
    assert isinstance(net["b"], SVFLayer)
    assert net["b"] is net["a"][0] is net["a"][1]
    merge_svf(net)
    assert type(net["b"]) is nn.Conv2d
    assert net["b"] is net["a"][0] is net["a"][1]


def test_merging_gives_back_class_arguments_bias_and_keys(kind):
    plain, x, _ = kind
    merged = merge_svf(apply_svf(copy.deepcopy(plain)))
    assert type(merged) is type(plain)
    assert repr(merged) == repr(plain)
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert relative(merged(x), plain(x)) < 1e-5


def test_merging_folds_in_what_was_trained():
    layer = apply_svf(nn.Conv2d(3, 4, 3).double())
    with torch.no_grad():
        layer.s.mul_(torch.linspace(-1, 2, 4))
    x, expected = torch.randn(1, 3, 6, 6, dtype=torch.float64), layer.weight.detach().clone()
    torch.testing.assert_close(merge_svf(nn.Sequential(layer))[0].weight, expected)
    assert layer(x).shape == (1, 4, 4, 4)  # the factored layer itself is left as it was


def test_hooks_set_before_fire_on_the_factored_and_on_the_merged_layer():
    net, calls = nn.Sequential(nn.Conv2d(3, 4, 1)), []
    handle = net[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.ones(1, 3, 2, 2)
    apply_svf(net)(x)
    merge_svf(net)(x)
    assert len(calls) == 2
    handle.remove()
    net(x)
    assert len(calls) == 2


def test_attention_reads_the_factored_projection_through_its_weight():
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(1, 5, 8)
    expected = attention(x, x, x)[0]
    apply_svf(attention)
    out = attention(x, x, x)[0]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    out.sum().backward()
    assert attention.out_proj.s.grad.abs().sum() > 0


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_a_vision_transformer_computes_what_it_did_before_training_and_after_merging(dtype, gap):
    torch.manual_seed(0)
    size = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}
    net = timm.create_model("vit_tiny_patch16_224", **size).to(dtype).eval()
    x = torch.randn(2, 3, 32, 32, dtype=dtype)
    plain = copy.deepcopy(net)
    apply_svf(net)

    factored = [name for name, module in net.named_modules() if isinstance(module, SVFLayer)]
    assert len(factored) == 1 + 2 * 4 + 1  # patches; qkv, projection and two of the MLP a block; the head
    assert relative(net(x), plain(x)) < gap
    with torch.no_grad():
        assert relative(net(x), plain(x)) < gap
        assert relative(merge_svf(net)(x), plain(x)) < gap
    assert repr(net) == repr(plain)


def test_a_copy_or_a_pickle_computes_the_same_and_trains_apart():
    layer, x = apply_svf(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        before = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            twin.s.zero_()
            torch.testing.assert_close(twin(x)[0, :, 0, 0], layer.bias)
        assert torch.equal(layer(x), before)


def test_a_checkpoint_brings_factors_and_values_back_exactly():
    trained = apply_svf(network(), ["layer2"])
    with torch.no_grad():
        trained["layer2"][0].s.mul_(-1.5)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    torch.manual_seed(7)
    other = nn.ModuleDict(network())
    nn.init.normal_(other["layer2"][0].weight)  # other weights: other factors, until loaded
    apply_svf(other, ["layer2"])
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(other["layer2"][0](x), trained["layer2"][0](x))


def test_given_factors_of_any_rank_make_a_layer_and_load_into_one():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 64, 3, padding=1)
    v, s, u = torch.randn(24, 3, 3, 3), torch.randn(1, 24, 1, 1), torch.randn(64, 24, 1, 1)
    x = torch.randn(1, 3, 7, 7)
    expected = F.conv2d(F.conv2d(x, v, padding=1) * s, u, conv.bias)

    layer = from_factors(conv, u, s, v)
    full = apply_svf(copy.deepcopy(conv))
    full.load_state_dict(layer.state_dict())

    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(full(x), expected, atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match=r"vh \(23, 3, 3, 3\) do not make a weight of shape \(64, 3, 3, 3\)"):
        from_factors(conv, u, s, v[:23])


def test_prepare_trains_the_values_of_its_stages_and_nothing_else():
    net = network()
    for stages in (["layer2", "layer20"], ["layer2"]):  # the second call leaves layer20 factored and frozen
        prepare(net, stages)
        prepare(net, stages)
        trained = [name for name, p in net.named_parameters() if p.requires_grad]
        assert trained == [f"{stage}.0.s" for stage in stages]
    assert type(net["layer1"][0]) is nn.Conv2d


# ---- what the authors' code does


CASE, ARRAYS = cases.load("svf_unit/resolver")
# Arguments that the golden file leaves out; found as the ones that reproduce its plain outputs.
GOLDEN = {
    "conv3x3": lambda: nn.Conv2d(16, 24, 3, 2, 2, 2),
    "conv1x1": lambda: nn.Conv2d(32, 20, 1, bias=False),
    "conv1x1_no_multiple_of_4": lambda: nn.Conv2d(32, 6, 1),
    "conv1x1_two_outputs": lambda: nn.Conv2d(32, 2, 1),
    "conv1x1_one_output": lambda: nn.Conv2d(32, 1, 1),
    "first_conv": lambda: nn.Conv2d(3, 64, 3, 1, 1, bias=False),
    "depthwise": lambda: nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False),
    "grouped": lambda: nn.Conv2d(16, 24, 3, 1, 1, groups=4, bias=False),
    "linear": lambda: nn.Linear(24, 12),
}


def golden(name):
    plain = GOLDEN[name]()
    plain.load_state_dict(fill.fill_state_dict(plain.state_dict(), rename=lambda key: f"{name}.{key}"))
    x = torch.from_numpy(fill.normal(CASE["inputs"]["seed_name"], name, CASE["layers"][name]["input"]))
    return apply_svf(plain), x


def test_the_golden_file_has_no_case_beyond_these():
    assert set(GOLDEN) == set(CASE["layers"])


@pytest.mark.parametrize("name", GOLDEN)
def test_every_golden_layer_keeps_its_plain_output(name):
    layer, x = golden(name)
    torch.testing.assert_close(layer(x), torch.from_numpy(ARRAYS[f"plain/{name}"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["conv3x3", "conv1x1"])
def test_singular_values_and_output_are_the_official_ones_where_the_official_code_is_right(name):
    layer, x = golden(name)
    torch.testing.assert_close(layer.s.detach(), torch.from_numpy(ARRAYS[f"S/{name}"]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer(x), torch.from_numpy(ARRAYS[f"svf/{name}"]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["conv1x1_no_multiple_of_4", "conv1x1_two_outputs", "first_conv"])
def test_full_rank_is_kept_where_the_official_code_rounds_down_to_a_multiple_of_four(name):
    layer, _ = golden(name)
    official = torch.from_numpy(ARRAYS[f"S/{name}"])
    assert len(layer.s) == CASE["layers"][name]["full_rank"] > len(official)
    torch.testing.assert_close(layer.s[: len(official)].detach(), official, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["conv1x1_one_output", "depthwise"])
def test_layers_that_the_official_code_skips_are_factored(name):
    assert CASE["layers"][name]["class"] == "Conv2d"
    assert len(golden(name)[0].s) == CASE["layers"][name]["weight"][0]


def test_a_grouped_convolution_keeps_the_function_that_the_official_code_changes():
    layer, x = golden("grouped")
    official = torch.from_numpy(ARRAYS["svf/grouped"])
    assert CASE["layers"]["grouped"]["max_abs_difference"] > 6  # of outputs up to 5.6
    assert relative(layer(x), official) > 0.5


def test_a_linear_layer_gets_its_factors_which_the_official_code_never_copies():
    layer, _ = golden("linear")
    assert "never copied" in CASE["layers"]["linear"]["remark"]
    weight = torch.from_numpy(fill.fill_array("linear.weight", (12, 24)))
    torch.testing.assert_close(layer.weight.detach(), weight, atol=1e-6, rtol=1e-5)


def test_the_first_convolution_at_the_official_rank_gives_the_official_output():
    layer, x = golden("first_conv")
    cut = from_factors(merge_svf(layer), layer.u[:, :24], layer.s[:24], layer.vh[:24])
    torch.testing.assert_close(cut(x), torch.from_numpy(ARRAYS["svf/first_conv"]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_kernel_of_evaluation_lies_as_the_images_do(layout):
    conv = nn.Conv2d(4, 6, 3)
    layer = SVFLayer(conv).requires_grad_(False)
    x = torch.randn(2, 4, 9, 9).to(memory_format=layout)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), conv(x))
        kernel = layer._plain_kernel(x)
        assert kernel.is_contiguous(memory_format=layout)
        assert layer._plain_kernel(x) is kernel  # and is not made again
