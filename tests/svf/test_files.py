"""Kilobyte files: they restore what was trained, fit one set of base weights, and mix."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from svf_lightning.backbones.efficientnet import efficientnet_lite0
from svf_lightning.backbones.resnet import resnet50
from svf_lightning.finetune import bn, rotation, svf
from svf_lightning.svf import files as singular_files
from svf_lightning.svf.layer import SVFLayer
from svf_lightning.svf.network import merge_svf


class Model(nn.Module):
    """A frozen stage, a trained stage with BatchNorm, and a head."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.ModuleDict(
            {
                "layer1": nn.Conv2d(3, 4, 3),
                "layer2": nn.Sequential(
                    nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 5, 1)
                ),
            }
        )
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        return self.head(self.backbone["layer2"](self.backbone["layer1"](x)))


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(3))


def trained(prepare=svf.prepare, seed=0, **options):
    """A model whose trainable values have moved."""
    model = Model(seed).eval()
    prepare(model.backbone, ["layer2"], **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return model


def saved(tmp_path, model, name="run.safetensors", **options):
    singular_files.write(tmp_path / name, singular_files.collect(model, **options))
    return tmp_path / name


def fresh():
    return Model().eval()


@pytest.mark.parametrize(
    ("prepare", "options"),
    [
        (svf.prepare, {}),
        (svf.prepare, {"rank": 2}),
        (svf.prepare, {"parametrization": "exp"}),
        (bn.prepare, {"svf": True}),
    ],
    ids=["full rank", "rank 2", "exp", "with BatchNorm"],
)
@pytest.mark.parametrize("prepared", [False, True])
def test_a_file_with_the_head_restores_the_predictions(tmp_path, prepare, options, prepared):
    model = trained(prepare, **options)
    path = saved(tmp_path, model, head=True)

    other = fresh()
    if prepared:
        prepare(other.backbone, ["layer2"], **options)
    singular_files.load(other, path)

    with torch.no_grad():
        assert not torch.allclose(fresh()(X), model(X), atol=1e-2)
        torch.testing.assert_close(other(X), model(X), atol=1e-6, rtol=1e-6)


def test_without_the_head_the_backbone_is_restored_and_the_head_left_alone(tmp_path):
    model = trained()
    path = saved(tmp_path, model)
    other = fresh()
    head = copy.deepcopy(other.head)
    singular_files.load(other, path)
    torch.testing.assert_close(other.head.state_dict(), head.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(
        merge_svf(other.backbone).state_dict(), merge_svf(model.backbone).state_dict(), atol=1e-6, rtol=1e-6
    )


def test_a_file_holds_no_factors():
    content = singular_files.collect(trained())
    assert {name: tuple(value.shape) for name, value in content.values.items()} == {
        "layer2.0": (8,),
        "layer2.2": (8,),
        "layer2.3": (5,),
    }
    assert not content.trained
    assert not content.head


def test_a_resnet50_fits_into_100_kilobytes(tmp_path, monkeypatch):
    def decompose(weight, groups=1):  # orthonormal factors of the right shape; the real ones take a minute
        matrix = weight.flatten(1)
        rank = min(matrix.shape)
        return torch.eye(len(matrix), rank), torch.ones(rank), torch.eye(rank, matrix.shape[1])

    monkeypatch.setattr("svf_lightning.svf.layer.decompose", decompose)
    backbone = resnet50(weights=None)
    svf.prepare(backbone)
    path = saved(tmp_path, backbone)
    assert sum(len(value) for value in singular_files.read(path).values.values()) == 12_544
    assert path.stat().st_size < 100_000


def test_the_sign_of_a_pair_of_singular_vectors_does_not_matter(tmp_path):
    path = saved(tmp_path, trained())
    other = fresh()
    svf.prepare(other.backbone, ["layer2"])
    with torch.no_grad():
        layer = other.backbone["layer2"][0]
        layer.u[:, 2] *= -1
        layer.vh[2] *= -1
    singular_files.load(other, path)


def unchanged(model):
    """That loading changed nothing, the structure neither."""
    torch.testing.assert_close(model.state_dict(), fresh().state_dict(), rtol=0, atol=0)
    return not any(isinstance(module, SVFLayer) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("layer1.weight", r"trained on base weights [0-9a-f]{12} \(vgg16, weights w.pth\), but these are"),
        ("layer2.1.running_mean", "trained on base weights"),
        ("layer2.0.bias", "trained on base weights"),
        ("layer2.0.weight", r"other base weights \(vgg16, weights w.pth\): 'layer2.0' has other singular"),
    ],
)
def test_other_base_weights_are_refused_by_name(tmp_path, name, reason):
    about = {"identity": {"backbone": "vgg16"}, "weights": "w.pth"}
    path = saved(tmp_path, trained(), about=about)
    other = fresh()
    value = other.backbone.state_dict()[name]
    keep = value.clone()
    value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError, match=f"run.safetensors.*{reason}"):
        singular_files.load(other, path)
    value.copy_(keep)
    assert unchanged(other)


def test_another_network_is_refused_by_the_layer_that_it_lacks(tmp_path):
    path = saved(tmp_path, trained(), about={"identity": {"backbone": "resnet101"}})
    other = nn.ModuleDict({"layer1": nn.Conv2d(3, 4, 3)})
    with pytest.raises(ValueError, match=r"'layer2\.0', which this backbone does not have; .* resnet101"):
        singular_files.load(other, path)


def test_values_that_are_equal_and_come_out_in_another_order_are_refused(tmp_path):
    def degenerate():
        model = fresh()
        nn.init.orthogonal_(model.backbone["layer2"][3].weight[:, :, 0, 0])  # five equal singular values
        return model

    torch.manual_seed(1)
    model = degenerate()
    torch.manual_seed(1)
    other = degenerate()
    svf.prepare(model.backbone, ["layer2"])
    path = saved(tmp_path, model)
    singular_files.load(copy.deepcopy(other), path)  # the same machine finds the same

    svf.prepare(other.backbone, ["layer2"])
    layer = other.backbone["layer2"][3]
    layer.u[:, :2], layer.vh[:2] = layer.u[:, [1, 0]], layer.vh[[1, 0]]
    with pytest.raises(ValueError, match=r"directions \[0, 1\] of 'layer2.3' come out differently"):
        singular_files.load(other, path)


@pytest.mark.parametrize(
    ("prepare", "options", "reason"),
    [
        (svf.prepare, {"train": ["s", "u"]}, "layer2.0: U or V trains"),
        (rotation.prepare, {}, "layer2.0: its factors are not the singular vectors"),
        (lambda backbone, stages: None, {}, "no layer of the backbone is factored"),
    ],
    ids=["U trains", "rotation", "frozen"],
)
def test_what_base_weights_would_not_give_back_is_not_written(prepare, options, reason):
    with pytest.raises(ValueError, match=reason):
        singular_files.collect(trained(prepare, **options))


def test_the_head_of_another_method_is_refused(tmp_path):
    path = saved(tmp_path, trained(), head=True)
    other = fresh()
    other.head = nn.Conv2d(5, 3, 1)
    with pytest.raises(ValueError, match=r"head of another method: 'head\.weight' differs"):
        singular_files.load(other, path)


def test_broken_foreign_and_missing_files_are_refused_by_name(tmp_path):
    path = saved(tmp_path, trained())
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cut\.safetensors cannot be read"):
        singular_files.read(tmp_path / "cut.safetensors")
    save_file({"s": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"foreign\.safetensors holds no singular values"):
        singular_files.read(tmp_path / "foreign.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        singular_files.read(tmp_path / "none.safetensors")


def test_a_file_of_a_diverged_run_is_refused(tmp_path):
    model = trained()
    with torch.no_grad():
        model.backbone["layer2"][0].s[1] = torch.nan
    with pytest.raises(ValueError, match=r"'layer2\.0' has NaN"):
        singular_files.load(fresh(), saved(tmp_path, model))


def test_what_a_run_says_of_itself_is_kept(tmp_path):
    about = {"identity": {"backbone": "vgg16", "fold": 2}, "miou": 0.25}
    assert singular_files.read(saved(tmp_path, trained(), about=about)).about == about


# ---- mixing


def test_a_blend_mixes_the_kernels_since_they_are_linear_in_the_values(tmp_path):
    a, b = trained(), trained()
    with torch.no_grad():
        for layer in b.backbone.modules():
            if isinstance(layer, SVFLayer):
                layer.s.mul_(-2)
    files = {saved(tmp_path, a, "a.safetensors"): 0.3, saved(tmp_path, b, "b.safetensors"): 0.7}

    mixed = fresh()
    singular_files.load(mixed, singular_files.blend(files))

    for name, layer in mixed.backbone.named_modules():
        if isinstance(layer, SVFLayer):
            expected = (
                0.3 * a.backbone.get_submodule(name).weight + 0.7 * b.backbone.get_submodule(name).weight
            )
            torch.testing.assert_close(layer.weight, expected, atol=1e-6, rtol=1e-5)


def test_a_blend_of_one_file_is_that_file(tmp_path):
    path = saved(tmp_path, trained(bn.prepare, svf=True), head=True)
    singular_files.write(tmp_path / "same.safetensors", singular_files.blend({path: 1.0}))
    for name, value in load_file(path).items():
        assert torch.equal(load_file(tmp_path / "same.safetensors")[name], value)


def test_weights_of_a_blend_that_do_not_add_up_to_one_are_refused(tmp_path):
    path = saved(tmp_path, trained())
    with pytest.raises(ValueError, match=r"add up to 0\.9, not 1"):
        singular_files.blend({path: 0.9})


def test_files_of_different_base_weights_are_not_mixed(tmp_path):
    a = saved(tmp_path, trained(), "a.safetensors")
    b = saved(tmp_path, trained(seed=1), "b.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors and .*a\.safetensors cannot be mixed"):
        singular_files.blend({a: 0.5, b: 0.5})


def test_files_that_differ_in_directions_alone_are_not_mixed():
    a, other = singular_files.collect(trained()), trained()
    other.backbone["layer2"][0].vh.copy_(other.backbone["layer2"][0].vh.flip(0))
    with pytest.raises(ValueError, match=r"other directions of 'layer2\.0'"):
        singular_files.blend([(a, 0.5), (singular_files.collect(other), 0.5)])


def test_the_fingerprint_is_the_same_before_and_after_factoring_and_training():
    layers = ["layer2.0", "layer2.2", "layer2.3"]
    assert singular_files.fingerprint(fresh().backbone, layers) == singular_files.collect(trained()).base


def test_files_from_before_the_stem_of_a_zoomed_network_was_renamed_still_fit():
    backbone = efficientnet_lite0(None, zoom=1.5)
    before = nn.ModuleDict(copy.deepcopy(dict(backbone.named_children())))
    before["layer0"] = nn.Sequential(nn.Identity(), *before["layer0"])  # the enlargement was a layer
    svf.prepare(before, ["layer4"])
    with torch.no_grad():
        before["layer4"][0][0].conv_pw.s.mul_(2)
    singular_files.load(backbone, singular_files.collect(before))
    values = backbone.layer4[0][0].conv_pw.s
    torch.testing.assert_close(values, before["layer4"][0][0].conv_pw.s, rtol=0, atol=0)
