"""CyCTR against slow explicit loops, hand-made cases, and what is written about the official code."""

import math

import pytest
import torch
import torchvision
from torch import nn

from svf_lightning.backbones.backbone import Backbone
from svf_lightning.backbones.resnet import resnet50
from svf_lightning.episode import Episode, Prediction
from svf_lightning.finetune import svf
from svf_lightning.models import cyctr
from svf_lightning.models.cyctr import CycleAttention, CyCTR, DeformableAttention, SupportTokens
from svf_lightning.runs.official import from_official
from svf_lightning.training.losses import cyctr_dice


def tiny_episode(shot=1, batch=2, side=65, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, shot + 1, 3, side, side, generator=generator)
    masks = torch.zeros(batch, shot + 1, side, side, dtype=torch.long)
    masks[:, :, 8:30, 10:40] = 1
    masks[:, :, 30:34, 10:40] = 255
    ids = torch.arange(batch * (shot + 1)).view(batch, -1)
    return Episode(
        images[:, 0], masks[:, 0], images[:, 1:], masks[:, 1:], torch.ones(batch), ids[:, 0], ids[:, 1:]
    )


def tiny_backbone():
    widths, strides = (3, 4, 6, 8, 8, 8), (2, 2, 2, 1, 1)
    stages = [
        nn.Sequential(nn.Conv2d(i, o, 3, stride, padding=1), nn.ReLU())
        for i, o, stride in zip(widths, widths[1:], strides, strict=False)
    ]
    return Backbone(stages, widths[1:], (2, 4, 8, 8, 8))


def tiny_model(**options):
    torch.manual_seed(0)
    model = CyCTR(tiny_backbone(), channels=16, **options)
    model.backbone.requires_grad_(False)
    return model


def without_dropout(model):
    """Training mode, but no dropout."""
    model.train()
    for module in model.modules():
        if "Dropout" in type(module).__name__:
            module.eval()
    return model


# -- deformable attention


def bilinear(image, x, y):
    """Read ``image (c, h, w)`` at a place in pixels, centres at integers; outside is zero."""
    total = torch.zeros(image.shape[0])
    x0, y0 = math.floor(x), math.floor(y)
    for row in (y0, y0 + 1):
        for column in (x0, x0 + 1):
            if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                total += (1 - abs(x - column)) * (1 - abs(y - row)) * image[:, row, column]
    return total


def test_deformable_attention_is_the_explicit_sum_over_places():
    torch.manual_seed(0)
    heads, points, channels, height, width = 2, 3, 8, 3, 4
    layer = DeformableAttention(channels, heads, points).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.7)
    query, source = torch.randn(2, 12, channels), torch.randn(2, 12, channels)
    is_padding = torch.rand(2, 12) < 0.2

    with torch.no_grad():
        ours = layer(query, source, is_padding, (height, width))
        expected = torch.zeros_like(ours)
        for b in range(2):
            value = source[b] @ layer.value_proj.weight.T
            value[is_padding[b]] = 0
            for n in range(12):
                offsets = layer.sampling_offsets(query[b, n]).view(heads, points, 2)
                weights = layer.attention_weights(query[b, n]).view(heads, points).softmax(dim=1)
                for head in range(heads):
                    part = slice(4 * head, 4 * head + 4)
                    image = value[:, part].T.reshape(4, height, width)
                    for p in range(points):  # an offset is counted in positions
                        x, y = n % width + offsets[head, p, 0].item(), n // width + offsets[head, p, 1].item()
                        expected[b, n, part] += weights[head, p] * bilinear(image, x, y)
        expected = expected @ layer.output_proj.weight.T
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_a_fresh_deformable_attention_averages_nine_positions_in_its_heads_direction():
    layer = DeformableAttention(channels=8, heads=8).eval()  # one channel a head
    nn.init.eye_(layer.value_proj.weight)
    nn.init.eye_(layer.output_proj.weight)
    image = torch.randn(8, 11, 12)
    tokens = image.flatten(1).T[None]
    with torch.no_grad():
        out = layer(torch.randn_like(tokens), tokens, torch.zeros(1, 132, dtype=torch.bool), (11, 12))
    out = out[0].T.view(8, 11, 12)
    # eight compass points, in steps of 45 degrees from right to down
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, (dx, dy) in enumerate(directions):
        padded = nn.functional.pad(image[head], (9, 9, 9, 9))
        shifted = [padded[9 + p * dy :, 9 + p * dx :][:11, :12] for p in range(1, 10)]
        torch.testing.assert_close(out[head], sum(shifted) / 9, atol=1e-5, rtol=0)


def test_training_drops_whole_tokens_without_scaling_the_rest():
    torch.manual_seed(0)
    layer = DeformableAttention(channels=8, heads=8)
    layer.attention_drop.eval()
    nn.init.zeros_(layer.sampling_offsets.bias)  # every position sees itself
    nn.init.eye_(layer.value_proj.weight)
    nn.init.eye_(layer.output_proj.weight)
    with torch.no_grad():
        out = layer(torch.ones(1, 900, 8), torch.ones(1, 900, 8), torch.zeros(1, 900).bool(), (30, 30))[0]
    dropped = (out.abs() < 1e-3).all(dim=1)
    assert 0.05 < dropped.float().mean() < 0.15
    torch.testing.assert_close(out[~dropped], torch.ones_like(out[~dropped]))


# -- position code


def test_the_position_code_counts_from_one_to_the_end_of_the_picture():
    is_padding = torch.zeros(1, 4, 5, dtype=torch.bool)
    is_padding[:, 3:], is_padding[:, :, 4:] = True, True  # a picture of 3 x 4 in the corner
    code = cyctr.sine_code(is_padding, 16).view(4, 5, 16)
    for row in range(3):
        for column in range(4):
            expected = []
            for share in ((row + 1) / 3, (column + 1) / 4):
                for i in range(8):
                    angle = 2 * math.pi * share / 10000 ** (2 * (i // 2) / 8)
                    expected.append(math.sin(angle) if i % 2 == 0 else math.cos(angle))
            torch.testing.assert_close(code[row, column], torch.tensor(expected), atol=1e-4, rtol=0)


# -- cycle consistency


def test_cycle_consistency_follows_the_two_best_matches():
    torch.manual_seed(0)
    similarity, is_object = torch.randn(2, 3, 5, 7), torch.rand(2, 7) < 0.5
    ours = cyctr.cycle_consistent(similarity, is_object)
    for b in range(2):
        for head in range(3):
            for j in range(7):
                column = similarity[b, head, :, j].tolist()
                row = similarity[b, head, column.index(max(column))].tolist()
                back = row.index(max(row))
                assert ours[b, head, j] == (is_object[b, j] == is_object[b, back])


def test_inconsistent_and_padded_tokens_get_no_attention():
    torch.manual_seed(0)
    layer = CycleAttention(channels=4, heads=1).eval()
    query = torch.randn(1, 6, 4)
    support = SupportTokens(torch.randn(1, 9, 4), torch.rand(1, 9) < 0.5, torch.zeros(1, 9).bool())
    support.is_padding[:, 2] = True
    with torch.no_grad():
        q, k, v = layer.q_fc(query[0]), layer.k_fc(support.features[0]), layer.v_fc(support.features[0])
        scores = q @ k.T / 2  # the root of four channels
        wanted = cyctr.cycle_consistent(scores[None, None], support.is_object)[0, 0] & ~support.is_padding[0]
        assert 0 < wanted.sum() < 8
        expected = layer.proj(scores[:, wanted].softmax(dim=1) @ v[wanted])
        torch.testing.assert_close(layer(query, support)[0], expected, atol=1e-6, rtol=1e-5)


def test_where_every_token_is_padding_all_of_them_are_attended_to():
    torch.manual_seed(0)
    layer = CycleAttention(channels=4, heads=2).eval()
    query, features = torch.randn(1, 6, 4), torch.randn(1, 9, 4)
    one_kind = torch.ones(1, 9).bool()  # all consistent
    with torch.no_grad():
        all_padded = layer(query, SupportTokens(features, one_kind, one_kind))
        none_padded = layer(query, SupportTokens(features, one_kind, ~one_kind))
    torch.testing.assert_close(all_padded, none_padded)


# -- sampling


def tokens_of(is_object):
    """Tokens whose only feature is their number; the even ones are padding."""
    count = len(is_object)
    number = torch.arange(count)
    return SupportTokens(number[None, :, None].float(), torch.tensor([is_object]), number[None] % 2 == 0)


@pytest.mark.parametrize(
    ("objects", "others", "target", "expected"),
    [
        (2, 9, 4, (2, 6)),  # few objects: all of them, background fills up
        (9, 3, 4, (5, 3)),  # little background
        (6, 7, 4, (4, 4)),
        (2, 3, 4, (2, 3)),  # fewer than wanted: all
    ],
)
def test_the_kind_with_too_few_tokens_gives_all_and_the_other_fills_up(objects, others, target, expected):
    torch.manual_seed(0)
    is_object = [True] * objects + [False] * others
    keys = torch.rand(1, objects + others)
    chosen = cyctr.sample_tokens(tokens_of(is_object), target, keys, "aligned")
    numbers = chosen.features[0, :, 0].long().tolist()
    assert len(set(numbers)) == len(numbers)
    assert (sum(n < objects for n in numbers), sum(n >= objects for n in numbers)) == expected
    assert chosen.is_object[0].tolist() == [n < objects for n in numbers]
    assert chosen.is_padding[0].tolist() == [n % 2 == 0 for n in numbers]


def test_the_smallest_keys_of_each_kind_are_chosen():
    keys = torch.tensor([[0.9, 0.1, 0.5, 0.8, 0.2, 0.6]])
    tokens = tokens_of([True, True, True, False, False, False])
    chosen = cyctr.sample_tokens(tokens, 2, keys, "aligned")
    assert chosen.features[0, :, 0].tolist() == [1, 2, 4, 5]


def test_the_official_sampling_mislabels_the_drawn_tokens_and_no_others():
    # Tokens 1 and 4 are objects. Background in order: 0, 2, 3, 5, that is number 0, 1, 2, 3.
    tokens = tokens_of([False, True, False, False, True, False])
    keys = torch.tensor([[0.1, 0.5, 0.9, 0.2, 0.6, 0.3]])
    aligned = cyctr.sample_tokens(tokens, 2, keys, "aligned")
    official = cyctr.sample_tokens(tokens, 2, keys, "official")
    assert official.features.tolist() == aligned.features.tolist() == [[[1.0], [4.0], [0.0], [3.0]]]
    assert aligned.is_object[0].tolist() == [True, True, False, False]
    # Two objects are drawn, numbers 0 and 1, and so are background numbers 0 and 2.
    assert official.is_object[0].tolist() == [False, True, False, False]
    assert official.is_padding[0].tolist() == [True, False, True, True]
    # With three wanted, both objects are taken whole: they keep their labels, the background does not.
    official = cyctr.sample_tokens(tokens, 3, keys, "official")
    assert official.features[0, :, 0].tolist() == [1, 4, 0, 3, 5, 2]
    assert official.is_object[0].tolist() == [True, True, False, False, False, True]  # 0, 2, 3 and 1 of all


def test_a_mask_of_one_kind_only_gets_some_of_the_other():
    empty, whole = torch.zeros(6, 8).bool(), torch.ones(6, 8).bool()
    some = empty.clone()
    some[1, 1] = True
    fixed = cyctr._both_kinds(torch.stack([empty, whole, some]))
    assert fixed[0].nonzero().tolist() == [[2, 3], [2, 4], [3, 3], [3, 4]]
    assert (~fixed[1]).nonzero().tolist() == [[0, 0], [0, 7], [5, 0], [5, 7]]
    assert fixed[2].equal(some)


# -- the whole model


def test_the_order_of_the_support_tokens_does_not_matter_when_all_are_taken():
    torch.manual_seed(0)
    transformer = cyctr.CycleTransformer(channels=16, heads=4).eval()
    query, is_padding = torch.randn(2, 16, 5, 6), torch.zeros(2, 5, 6).bool()
    tokens = SupportTokens(torch.randn(2, 30, 16), torch.rand(2, 30) < 0.4, torch.rand(2, 30) < 0.2)
    order = torch.randperm(30)
    shuffled = SupportTokens(*(field[:, order] for field in tokens))
    with torch.no_grad():
        first = transformer(query, is_padding, tokens, 1, torch.rand(2, 30))
        second = transformer(query, is_padding, shuffled, 1, torch.rand(2, 30))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shot", [1, 2])
def test_evaluation_repeats_itself_for_any_batch_size_and_global_seed(shot):
    model = tiny_model(tokens_per_shot=9).eval()  # 128 background positions: a draw
    episode = tiny_episode(shot, batch=3)
    with torch.no_grad():
        together = model(episode).logits
        torch.manual_seed(1)
        again = model(episode).logits
        alone = torch.cat([model(Episode(*(f[i : i + 1] for f in episode))).logits for i in range(3)])
        other_ids = model(episode._replace(query_id=episode.query_id + 100)).logits
    torch.testing.assert_close(again, together, atol=0, rtol=0)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-4)
    assert (other_ids - together).abs().max() > 1e-4  # so the draw does matter


def test_evaluation_does_not_read_the_querys_mask():
    model, episode = tiny_model().eval(), tiny_episode()
    with torch.no_grad():
        blind = model(episode._replace(query_mask=torch.full_like(episode.query_mask, 255)))
        torch.testing.assert_close(blind.logits, model(episode).logits, atol=0, rtol=0)
    assert blind.auxiliary == {}


def test_padding_is_found_in_the_picture_of_the_query_and_in_the_labels_of_the_supports():
    model, episode = tiny_model().eval(), tiny_episode(side=64)
    black = -torch.tensor(model.backbone.mean) / torch.tensor(model.backbone.std)
    episode.query_image[:, :, 40:] = black[:, None, None]
    query_padding = torch.zeros(2, 64, 64).bool()
    query_padding[:, 40:] = True
    nowhere = torch.zeros(2, 64, 64).bool()
    with torch.no_grad():
        found = model(episode).logits
        told = model(episode, query_padding, episode.support_masks == 255).logits
        ignored = model(episode, nowhere).logits
        unpadded = model(episode, support_padding=nowhere[:, None]).logits
    torch.testing.assert_close(found, told, atol=0, rtol=0)
    assert (ignored - found).abs().max() > 1e-5
    assert (unpadded - found).abs().max() > 1e-5


def test_everything_that_trains_gets_a_gradient_and_so_do_singular_values_of_all_stages():
    model, episode = tiny_model(), tiny_episode(shot=2)
    svf.prepare(model.backbone)
    for layer in model.transformer.qry_self_layers:  # a fresh one does not look at positions yet
        nn.init.normal_(layer.sampling_offsets.weight, std=0.1)
    cyctr_dice(without_dropout(model)(episode), episode).backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    assert silent == []
    trained = {n.split(".")[0] for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}


# -- loss


def logit(p):
    return torch.tensor(p, dtype=torch.float32).logit()


def test_dice_is_the_hand_calculation_and_ignored_pixels_count_below_the_line_only():
    # One row of three pixels: background, object, ignored; probabilities of background and foreground.
    logits = logit([[[[0.8, 0.4, 0.6]], [[0.2, 0.7, 0.5]]]])
    mask = torch.tensor([[[0, 1, 255]]])
    episode = Episode(torch.zeros(1, 3, 1, 3), mask, torch.zeros(1, 1, 3, 1, 3), mask[None], torch.ones(1))
    below = (0.64 + 0.16 + 0.36 + 1, 0.04 + 0.49 + 0.25 + 1)
    published = (1 - 2 * 0.8 / below[0]) + (1 - 2 * 0.7 / below[1])
    ignoring = (1 - 2 * 0.8 / (below[0] - 0.36)) + (1 - 2 * 0.7 / (below[1] - 0.25))
    prediction = Prediction(logits)
    assert cyctr_dice(prediction, episode).item() == pytest.approx(published, rel=1e-6)
    assert cyctr_dice(prediction, episode, count_ignored=False).item() == pytest.approx(ignoring, rel=1e-6)

    # Two shots whose logits are the query's: their mean is its own loss once more.
    twice = episode._replace(support_masks=mask[None].repeat(1, 2, 1, 1))
    both = Prediction(logits, {"support": logits[:, None].repeat(1, 2, 1, 1, 1)})
    assert cyctr_dice(both, twice, auxiliary_weight=0.5).item() == pytest.approx(1.5 * published, rel=1e-6)


def test_the_auxiliary_target_is_the_support_mask():
    episode = tiny_episode(shot=2)
    right = torch.stack([episode.support_masks == 0, episode.support_masks == 1], dim=2) * 40.0 - 20
    main = torch.stack([episode.query_mask == 0, episode.query_mask == 1], dim=1) * 40.0 - 20
    assert cyctr_dice(Prediction(main, {"support": right}), episode).item() == pytest.approx(0, abs=1e-5)
    assert cyctr_dice(Prediction(main, {"support": -right}), episode).item() > 1


# -- official names and numbers

OFFICIAL_HEAD = {
    "adjust_feature_supp.0.weight": (256, 1536, 1, 1),
    "adjust_feature_qry.0.weight": (256, 1536, 1, 1),
    "qry_merge_feat.0.weight": (256, 513, 1, 1),
    "supp_merge_feat.0.weight": (256, 512, 1, 1),
    "transformer.level_embed": (1, 256),
    **{f"transformer.qry_self_layers.{i}.sampling_offsets.weight": (144, 256) for i in range(2)},
    **{f"transformer.qry_self_layers.{i}.sampling_offsets.bias": (144,) for i in range(2)},
    **{f"transformer.qry_self_layers.{i}.attention_weights.weight": (72, 256) for i in range(2)},
    **{f"transformer.qry_self_layers.{i}.attention_weights.bias": (72,) for i in range(2)},
    **{
        f"transformer.qry_self_layers.{i}.{n}_proj.weight": (256, 256)
        for i in range(2)
        for n in ("value", "output")
    },
    **{
        f"transformer.cross_layers.{i}.{n}.weight": (256, 256)
        for i in range(2)
        for n in ("q_fc", "k_fc", "v_fc", "proj")
    },
    **{f"transformer.ffns.{i}.layers.0.0.weight": (768, 256) for i in range(4)},
    **{f"transformer.ffns.{i}.layers.1.weight": (256, 768) for i in range(4)},
    **{f"transformer.layer_norms.{i}.{n}": (256,) for i in range(8) for n in ("weight", "bias")},
    "merge_multi_lvl_reduce.0.weight": (256, 256, 1, 1),
    "merge_multi_lvl_sum.0.weight": (256, 256, 3, 3),
    "merge_multi_lvl_sum.2.weight": (256, 256, 3, 3),
    "cls.0.weight": (256, 256, 3, 3),
    "cls.3.weight": (2, 256, 1, 1),
    "cls.3.bias": (2,),
    "pred_supp_qry_proj.0.weight": (256, 256, 1, 1),
    "supp_init_merge.0.weight": (256, 512, 1, 1),
    "supp_beta_conv.0.weight": (256, 256, 3, 3),
    "supp_beta_conv.2.weight": (256, 256, 3, 3),
    "supp_cls.0.weight": (256, 256, 3, 3),
    "supp_cls.3.weight": (2, 256, 1, 1),
    "supp_cls.3.bias": (2,),
}
UNUSED = {"addtional_proj.0.weight": (256, 256, 1, 1), "addtional_proj.2.weight": (256, 256, 1, 1)}


def test_names_shapes_and_counts_are_the_official_ones():
    model = CyCTR(resnet50(weights=None))
    head = {k: tuple(v.shape) for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    assert head == OFFICIAL_HEAD
    assert sum(p.numel() for p in model.transformer.parameters()) == 2_474_672
    trainable = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("backbone."))
    assert trainable + sum(math.prod(shape) for shape in UNUSED.values()) == 7_456_692


@pytest.fixture(scope="module")
def official_state():
    """What an official checkpoint holds, in its own names; layers 1 to 4 are torchvision's."""
    shapes = {f"module.{k}": shape for k, shape in (OFFICIAL_HEAD | UNUSED).items()}
    for number, (inputs, outputs) in enumerate([(3, 64), (64, 64), (64, 128)], start=1):
        shapes[f"module.backbone.body.conv{number}.weight"] = (outputs, inputs, 3, 3)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"module.backbone.body.bn{number}.{name}"] = (outputs,)
    for key, tensor in torchvision.models.resnet50().state_dict().items():
        if key.startswith("layer") and not key.endswith("num_batches_tracked"):
            shapes[f"module.backbone.body.{key}"] = tuple(tensor.shape)
    for key in ("layer1.0.conv1", "layer1.0.downsample.0"):  # behind a deep stem
        name = f"module.backbone.body.{key}.weight"
        shapes[name] = (shapes[name][0], 128, 1, 1)
    return {key: torch.full(shape, float(i)) for i, (key, shape) in enumerate(shapes.items())}


def test_an_official_checkpoint_finds_its_places(official_state):
    model = from_official("cyctr", {"epoch": 3, "state_dict": official_state})
    ours = {key.removeprefix("backbone."): tensor.flatten()[0] for key, tensor in model.state_dict().items()}
    places = {"conv1": "layer0.0", "bn1": "layer0.1", "conv2": "layer0.3", "bn2": "layer0.4"}
    places |= {"conv3": "layer0.6", "bn3": "layer0.7"}
    for key, tensor in official_state.items():
        if "addtional_proj" not in key:
            name = key.removeprefix("module.").removeprefix("backbone.body.")
            module, _, rest = name.partition(".")
            name = f"{places[module]}.{rest}" if module in places and "backbone" in key else name
            assert ours.pop(name) == tensor.flatten()[0], key
    assert all(key.endswith("num_batches_tracked") for key in ours)
    assert model.transformer.sampling == "official"
    assert model.backbone.layer3[0].conv2.dilation == (1, 1)  # scheme B
    assert {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad} == {"backbone"}


def test_a_checkpoint_of_another_network_is_refused_by_name(official_state):
    with pytest.raises(ValueError, match=r"level_embed"):
        from_official("cyctr", {k: v for k, v in official_state.items() if "level_embed" not in k})
    with pytest.raises(ValueError, match="resnet50 or resnet101"):
        from_official("cyctr", official_state, backbone="vgg16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "random"}, "sampling must be"),
        ({"grid": "layer1"}, "grid must be"),
        ({"init": "zeros"}, "init must be"),
        ({"prior_stages": [5]}, "prior_stages must be"),
        ({"channels": 20}, "divisible by 4 and by heads=8, got 20"),
        ({"tokens_per_shot": 0}, "tokens_per_shot must be"),
    ],
)
def test_an_impossible_option_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        CyCTR(tiny_backbone(), **options)
