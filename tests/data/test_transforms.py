"""Transforms against what the official code did to a made picture, and against arithmetic done by hand."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from svf_lightning.data.transforms import (
    Augment,
    Letterbox,
    _blur,
    _crop,
    _rotate,
    binary_mask,
    letterbox_size,
    normalize,
    resize_pair,
)
from svf_lightning.training.segmenter import predict_masks
from tests.golden import cases, fill

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
STILL = {"scale": (1, 1), "rotate_p": 0, "blur_p": 0, "flip_p": 0}  # nothing but the crop
NOTHING = np.random.default_rng(0)  # for transforms that draw nothing that matters


def picture(height, width):
    """The picture of the golden data cases, as their JSON describes it, and its label."""
    y, x = np.arange(height)[:, None], np.arange(width)[None]
    red = np.broadcast_to(255 * y / (height - 1), (height, width))
    green = np.broadcast_to(255 * x / (width - 1), (height, width))
    blue = 255 * ((y + 2 * x) % 50) / 49
    image = np.floor(np.stack([red, green, blue])).astype(np.float32)
    label = np.zeros((height, width), np.uint8)
    label[height // 5 : height // 2, width // 4 : 3 * width // 4] = 1
    label[:7] = 255
    return torch.from_numpy(image), torch.from_numpy(label)


def official(image, label, pipeline, size):
    """What we have for each transform of the golden cases: normalised image and label."""
    if pipeline == "Direct_Resize":
        image, label = resize_pair(image, label, size, size)
        return normalize(image, MEAN, STD), label
    pad = "mean" if pipeline == "Resize_padded" else "black"
    return Letterbox(size, MEAN, STD, pad=pad)(image, label)


def golden_results():
    for repository in ("svf", "bam", "pfenet", "cyctr", "cwt"):
        case, _ = cases.load(f"data/{repository}")
        for name in case["arrays"]:
            kind, run = name.split("/")
            pipeline, source = run.split("_from_")
            pipeline = pipeline.replace("_145", "").replace("_zeros", "")
            yield repository, name, kind, pipeline, [int(side) for side in source.split("x")]


@pytest.mark.parametrize(("repository", "name", "kind", "pipeline", "sides"), list(golden_results()))
def test_validation_transforms_do_what_the_official_ones_did(repository, name, kind, pipeline, sides):
    case, arrays = cases.load(f"data/{repository}")
    image, label = picture(*sides)
    strides = case["arrays"][name]["strides"]
    ours = official(image, label, pipeline, 145)[kind != "image"]
    if kind == "padding":  # CyCTR's padding mask is the ignored part of the label
        ours = torch.where(ours == 255, 255, 0)
    ours = fill.subsample(ours.numpy(), strides)
    if kind == "image":  # 2e-4 is 0.01 of a grey value: both sides round coordinates to float32
        np.testing.assert_allclose(ours, arrays[name], atol=2e-4, rtol=0)
    else:
        np.testing.assert_array_equal(ours, arrays[name])


def test_letterbox_sides_are_cut_to_multiples_of_eight():
    assert letterbox_size(375, 500, 473) == (352, 472)
    assert letterbox_size(500, 333, 473) == (472, 312)
    assert letterbox_size(480, 640, 641) == (480, 640)
    assert letterbox_size(372, 500, 473) == (344, 472)  # 351.9 is cut to 351 first, not rounded to 352
    assert letterbox_size(10, 500, 473) == (8, 472)  # never to nothing


def test_letterbox_pads_the_image_with_black_and_the_mask_with_ignore():
    image, mask = torch.full((3, 60, 100), 200, dtype=torch.uint8), torch.zeros(60, 100, dtype=torch.uint8)

    image, mask = Letterbox(97, MEAN, STD)(image, mask)

    black, white = ((value - np.array(MEAN)) / np.array(STD) for value in (0, 200 / 255))
    np.testing.assert_allclose(image[:, 60, 50], black, atol=1e-5)
    np.testing.assert_allclose(image[:, 30, 96], black, atol=1e-5)
    np.testing.assert_allclose(image[:, 55, 95], white, atol=1e-5)
    assert mask[:56, :96].eq(0).all()
    assert mask[56:].eq(255).all()
    assert mask[:, 96:].eq(255).all()


def test_letterbox_padding_with_the_mean_is_zero_after_normalisation():
    image, mask = torch.zeros(3, 60, 100), torch.zeros(60, 100, dtype=torch.uint8)

    image, _ = Letterbox(97, MEAN, STD, pad="mean")(image, mask)

    torch.testing.assert_close(image[:, 56:], torch.zeros(3, 41, 97), atol=1e-6, rtol=0)


def test_without_the_cut_a_perfect_prediction_of_a_narrow_picture_meets_the_truth():
    label = torch.zeros(663, 227, dtype=torch.uint8)
    label[400:600, 60:200] = 1

    def iou(**settings):
        _, small = Letterbox(257, MEAN, STD, **settings)(torch.zeros(3, 663, 227), label)
        logits = torch.stack([small != 1, small == 1]).float()
        [mask] = predict_masks(logits[None], [(663, 227)])
        return (mask.bool() & (label == 1)).sum() / (mask.bool() | (label == 1)).sum()

    assert iou(multiple=1) > 0.95  # what the small grid loses at the edges
    assert iou() < 0.9  # the published protocol: 87 columns are cut to 80, and enlarged as if they were 87


def test_nearest_reads_position_floor_of_x_times_scale():
    # 375 -> 352 and 500 -> 472: positions in float32 would be wrong in hundreds of places
    label = (torch.arange(375)[:, None] * 7 + torch.arange(500) * 3).remainder(251).to(torch.uint8)

    _, small = resize_pair(torch.zeros(3, 375, 500), label, 352, 472)

    rows, columns = [y * 375 // 352 for y in range(352)], [x * 500 // 472 for x in range(472)]
    torch.testing.assert_close(small, label[rows][:, columns])


def test_bilinear_resize_keeps_a_ramp_a_ramp_without_antialiasing():
    ramp = torch.arange(100.0).expand(3, 40, 100)

    small, _ = resize_pair(ramp, torch.zeros(40, 100, dtype=torch.uint8), 20, 40)

    # Half-pixel centres: column x of 40 lies at 2.5 x + 0.75 of 100
    torch.testing.assert_close(small, (2.5 * torch.arange(40) + 0.75).expand(3, 20, 40), atol=1e-4, rtol=0)


def test_mask_of_a_class_keeps_ignore_and_drops_the_other_classes():
    label = torch.tensor([[0, 1, 2], [255, 2, 20]], dtype=torch.uint8)

    assert binary_mask(label, 2).tolist() == [[0, 0, 1], [255, 1, 0]]
    assert label.tolist() == [[0, 1, 2], [255, 2, 20]]  # the label of the next class is still whole


def test_a_dot_turns_counter_clockwise_about_the_pixel_at_half_width_and_height():
    image, mask = torch.zeros(3, 61, 81), torch.zeros(61, 81, dtype=torch.uint8)
    image[:, 30, 60], mask[30, 60] = 1, 1  # 19.5 right of the centre, 0.5 above it

    image, mask = _rotate(image, mask, degrees=30)

    cosine, sine = math.cos(math.pi / 6), math.sin(math.pi / 6)
    across, down = 60 - 40.5, 30 - 30.5
    x, y = 40.5 + cosine * across + sine * down, 30.5 - sine * across + cosine * down
    weight = image[0].double()
    assert weight.sum() == pytest.approx(1, abs=0.2)  # one pixel's worth of light, spread over its neighbours
    assert (weight * torch.arange(81)).sum() / weight.sum() == pytest.approx(x, abs=0.2)
    assert (weight * torch.arange(61)[:, None]).sum() / weight.sum() == pytest.approx(y, abs=0.2)
    [[row, column]] = mask.eq(1).nonzero().tolist()
    assert (column, row) == (pytest.approx(x, abs=0.8), pytest.approx(y, abs=0.8))


@pytest.mark.parametrize("degrees", [-10, 7.3])
def test_rotation_agrees_with_pillow(degrees):
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 255, (9, 12), dtype=np.uint8))
    smooth = np.array(noise.resize((120, 90), Image.Resampling.BICUBIC))
    mask = (smooth > 128).astype(np.uint8)
    # Pillow puts pixel centres at .5: the centre in its terms is half a pixel further
    turn = {"angle": degrees, "center": (60.5, 45.5), "fillcolor": 255}
    image_pillow = np.array(Image.fromarray(smooth).rotate(resample=Image.Resampling.BILINEAR, **turn))
    mask_pillow = np.array(Image.fromarray(mask).rotate(resample=Image.Resampling.NEAREST, **turn))

    image, turned = _rotate(
        torch.from_numpy(smooth).float().expand(3, -1, -1), torch.from_numpy(mask), degrees
    )

    inner = np.s_[15:75, 15:105]  # the border is mixed otherwise
    assert np.abs(image[1].numpy() - image_pillow)[inner].max() <= 1.01  # Pillow cuts to whole grey values
    assert (turned.numpy() != mask_pillow).mean() < 1e-3
    assert image_pillow[inner].std() > 10


def test_blur_of_a_dot_is_the_binomial_kernel():
    dot = torch.zeros(3, 9, 9)
    dot[:, 4, 4] = 256

    row = torch.tensor([1.0, 4, 6, 4, 1])
    torch.testing.assert_close(_blur(dot)[0, 2:7, 2:7], row[:, None] * row)
    assert _blur(dot).sum() == 3 * 256


def test_blur_reflects_at_the_border():
    generator = np.random.default_rng(0)
    image = generator.random((6, 7))
    padded = np.pad(image, 2, mode="reflect")
    kernel = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    expected = [[(padded[y : y + 5, x : x + 5] * kernel).sum() for x in range(7)] for y in range(6)]

    torch.testing.assert_close(
        _blur(torch.from_numpy(image)[None])[0], torch.tensor(expected, dtype=torch.double)
    )


def test_flip_and_crop_at_the_images_own_size_mirror_every_pixel():
    image = torch.randint(256, (3, 33, 33), generator=torch.manual_seed(0), dtype=torch.uint8)
    mask = torch.randint(2, (33, 33), dtype=torch.uint8)
    augment = Augment(33, **GREY, **{**STILL, "flip_p": 1})

    flipped, flipped_mask = augment(image, mask, NOTHING)

    torch.testing.assert_close(flipped, (image.flip(-1) / 255 - 0.5) / 0.25)
    torch.testing.assert_close(flipped_mask, mask.flip(-1))


def test_padding_is_mean_colour_and_ignore_with_the_smaller_half_first():
    image, mask = torch.full((3, 10, 21), 255, dtype=torch.uint8), torch.zeros(10, 21, dtype=torch.uint8)

    image, mask = Augment(15, **GREY, **STILL)(image, mask, NOTHING)

    assert mask[:2].eq(255).all()
    assert mask[2:12].eq(0).all()
    assert mask[12:].eq(255).all()
    assert image[:, mask == 255].eq(0).all()
    torch.testing.assert_close(image[:, mask == 0], torch.full((3, 150), 2.0))


def test_a_rotated_image_has_mean_colour_where_its_mask_is_ignored():
    image, mask = torch.full((3, 65, 65), 255, dtype=torch.uint8), torch.zeros(65, 65, dtype=torch.uint8)
    augment = Augment(65, **GREY, **{**STILL, "rotate_p": 1}, rotate=10)

    image, mask = augment(image, mask, np.random.default_rng(0))

    corners = image[0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.min() == 0
    assert mask[0, 0] == mask[-1, -1] == 255
    assert image[:, mask == 255].mean() < 0.5  # 2 is white, and only the seam is mixed
    torch.testing.assert_close(image[:, 20:45, 20:45], torch.full((3, 25, 25), 2.0))


def test_crops_keep_the_foreground_share_whenever_some_draw_does():
    image, mask = torch.zeros(3, 64, 64), torch.zeros(64, 64, dtype=torch.uint8)
    mask[20:44, 20:44] = 1  # about a fifth of the 33 x 33 offsets see 85 % of it

    kept, careless = (
        [_crop(image, mask, 32, share, np.random.default_rng(i))[1].sum().item() for i in range(60)]
        for share in (0.85, 0.0)
    )

    assert np.mean(np.array(careless) >= 0.85 * 24 * 24) < 0.4
    assert np.mean(np.array(kept) >= 0.85 * 24 * 24) > 0.98  # all 32 draws miss in 1 of 1000


def test_the_crop_is_drawn_again_at_most_31_times():
    mask = torch.zeros(40, 40, dtype=torch.uint8)
    mask[0, 0] = mask[-1, -1] = 1  # no crop of 8 can hold both

    class Counted:
        draws = 0

        def integers(self, high):
            self.draws += 1
            return np.random.default_rng(self.draws).integers(1, high - 1)

    generator = Counted()
    _crop(torch.zeros(3, 40, 40), mask, 8, 0.85, generator)

    assert generator.draws == 2 * (1 + 31)  # a row and a column each


def test_ignored_pixels_are_no_foreground_to_the_crop():
    mask = torch.full((40, 40), 255, dtype=torch.uint8)
    mask[10:20, 10:20] = 1

    crops = [_crop(torch.zeros(3, 40, 40), mask, 24, 1.0, np.random.default_rng(i))[1] for i in range(20)]

    assert all(crop.eq(1).sum() == 100 for crop in crops)


def test_scale_is_isotropic_and_stays_in_its_range():
    image, mask = torch.zeros(3, 100, 50), torch.zeros(100, 50, dtype=torch.uint8)
    augment = Augment(129, **GREY, **{**STILL, "scale": (0.9, 1.1)})

    sizes = []
    for i in range(50):
        inside = augment(image, mask, np.random.default_rng(i))[1] == 0
        sizes.append((inside.any(1).sum().item(), inside.any(0).sum().item()))

    assert all(abs(height - 2 * width) <= 1 for height, width in sizes)
    assert 90 <= min(sizes)[0] < 94
    assert 106 < max(sizes)[0] <= 110


@pytest.mark.parametrize("threads", [1, 2])
def test_augmentation_depends_on_its_generator_alone(threads):
    image, mask = picture(120, 200)
    augment = Augment(145, MEAN, STD, rotate_p=1, blur_p=1)
    before = torch.get_num_threads()
    reference = augment(image, mask, np.random.default_rng(5))
    try:
        torch.set_num_threads(threads)  # workers have one thread, the main process more
        torch.manual_seed(threads)
        again = augment(image, mask, np.random.default_rng(5))
    finally:
        torch.set_num_threads(before)

    assert torch.equal(reference[0], again[0])
    assert torch.equal(reference[1], again[1])
    assert not torch.equal(reference[0], augment(image, mask, np.random.default_rng(6))[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": (1.1, 0.9)}, r"scale=\(1.1, 0.9\)"),
        ({"flip_p": 2}, r"flip_p=2 is not in \[0, 1\]"),
        ({"size": 0}, "size=0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Augment(**{"size": 33, **GREY, **settings})


def test_a_letterbox_refuses_sizes_and_pads_it_cannot_make():
    with pytest.raises(ValueError, match="size=7"):
        Letterbox(7, **GREY)
    with pytest.raises(ValueError, match="pad='white'"):
        Letterbox(33, **GREY, pad="white")
    with pytest.raises(ValueError, match="multiple=0"):
        Letterbox(33, **GREY, multiple=0)
