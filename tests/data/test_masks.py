"""Every usual way to store a mask or a picture gives the same pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from svf_lightning.data.images import read_image, to_rgb
from svf_lightning.data.masks import align, class_ids, displayed, drawn_mask, shrink

ONES = np.zeros((6, 9), np.uint8)  # not square, so that a turn shows
ONES[1:4, 2:8] = 1
BLACK_RED = [0, 0, 0, 128, 0, 0]


def palette(indices, colours):
    image = Image.fromarray(indices)
    image.putpalette(colours)
    return image


def stored(image, file_format="PNG", **options):
    """What comes back from a file."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return Image.open(file)


WAYS = {
    "0/1": lambda: Image.fromarray(ONES),
    "0/255": lambda: Image.fromarray(255 * ONES),
    "0/128": lambda: Image.fromarray(128 * ONES),
    "one bit": lambda: Image.fromarray(255 * ONES).convert("1"),
    "16 bits, 0/65535": lambda: Image.fromarray(65535 * ONES.astype(np.uint16)),
    "16 bits, 0/1": lambda: Image.fromarray(ONES.astype(np.uint16)),
    "32 bits": lambda: Image.fromarray(ONES.astype(np.int32)),
    "white on black": lambda: Image.fromarray(np.repeat(255 * ONES[..., None], 3, axis=2)),
    "red on black": lambda: Image.fromarray(ONES[..., None] * np.array([200, 0, 0], np.uint8)),
    "opaque": lambda: Image.fromarray(ONES[..., None] * np.array([255, 255, 255, 255], np.uint8)),
    "opaque black": lambda: Image.fromarray(ONES[..., None] * np.array([0, 0, 0, 255], np.uint8)),
    "white on opaque black": lambda: Image.fromarray(
        np.concatenate([np.repeat(255 * ONES[..., None], 3, axis=2), np.full((6, 9, 1), 255, np.uint8)], 2)
    ),
    "grey and alpha": lambda: Image.merge("LA", [Image.new("L", (9, 6), 90), Image.fromarray(255 * ONES)]),
    "palette, black and red": lambda: palette(ONES, BLACK_RED),
    "palette of VOC, class 15": lambda: palette(15 * ONES, [0, 0, 0] + [99, 3, 7] * 20),
    "palette that begins with white": lambda: palette(1 - ONES, [255, 255, 255, 0, 0, 0]),
    "palette, red first": lambda: palette(1 - ONES, [255, 0, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_mask_is_the_same_however_it_is_stored(way):
    image = WAYS[way]()
    image = stored(image, "TIFF") if image.mode == "I" else stored(image)

    assert drawn_mask(image).tolist() == ONES.tolist()
    assert drawn_mask(image).dtype == np.uint8


def test_shades_are_cut_at_half_of_the_brightest():
    shades = np.array([[0, 40, 99, 101, 150, 200]], np.uint8)

    assert drawn_mask(Image.fromarray(shades)).tolist() == [[0, 0, 0, 1, 1, 1]]


def test_a_mask_saved_as_jpeg_keeps_its_shape():
    wide = np.kron(255 * ONES, np.ones((8, 8), np.uint8))  # whole blocks: the compression leaves them alone

    assert drawn_mask(stored(Image.fromarray(wide), "JPEG", quality=60)).tolist() == (wide // 255).tolist()


def test_of_0_1_and_255_the_last_is_ignored():
    ring = ONES.copy()
    ring[0] = 255

    assert drawn_mask(Image.fromarray(ring)).tolist() == ring.tolist()


def test_nothing_drawn_is_an_empty_mask_and_everything_drawn_a_full_one():
    assert not drawn_mask(Image.new("L", (5, 4))).any()
    assert drawn_mask(Image.new("L", (5, 4), 255)).all()


def test_class_ids_in_place_of_a_mask_are_refused():
    ids = ONES.copy()
    ids[0] = 2

    with pytest.raises(
        ValueError, match=r"holds the values 0, 1, 2, which look like class ids.*white on black"
    ):
        drawn_mask(Image.fromarray(ids))
    with pytest.raises(ValueError, match="class ids"):
        drawn_mask(palette(ids, [0, 0, 0, 128, 0, 0, 0, 128, 0]))


def test_several_colours_in_place_of_a_mask_are_refused():
    colours = np.zeros((6, 9, 3), np.uint8)
    colours[:3, :, 0], colours[3:5, :, 1] = 255, 255

    with pytest.raises(ValueError, match="shows 2 colours"):
        drawn_mask(Image.fromarray(colours))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_class_ids_survive_any_width_of_integer(dtype):
    ids = np.array([[0, 3, 20], [255, 7, 1]])

    assert class_ids(Image.fromarray(ids.astype(dtype))).tolist() == ids.tolist()


def test_class_ids_of_a_palette_are_indices_and_of_grey_colours_values():
    assert class_ids(palette(3 * ONES, [7, 8, 9] * 4)).tolist() == (3 * ONES).tolist()
    assert class_ids(Image.fromarray(3 * ONES).convert("RGB")).tolist() == (3 * ONES).tolist()


def test_class_ids_above_255_and_colours_are_refused():
    with pytest.raises(ValueError, match="ids up to 300, but ids end at 255"):
        class_ids(Image.fromarray(np.array([[300, 1]], np.uint16)))
    with pytest.raises(ValueError, match=r"shows colours \(mode RGB\)"):
        class_ids(Image.fromarray(ONES[..., None] * np.array([9, 0, 0], np.uint8)))


@pytest.mark.parametrize(
    ("bits", "brightest", "shown"),
    [(16, 65535, 255), (16, 32768, 128), (12, 4095, 255), (12, 2048, 128), (8, 200, 200)],
)
def test_a_16_bit_picture_is_scaled_by_the_bits_that_it_uses(bits, brightest, shown, tmp_path):
    values = np.array([[0, brightest]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")

    assert read_image(tmp_path / "deep.png").tolist() == [[[0, shown]]] * 3


def test_float_pictures_of_either_range_are_read():
    unit, bytes_ = np.array([[0, 0.5, 1.0]], np.float32), np.array([[0, 127.5, 255.0]], np.float32)

    for values in (unit, bytes_):
        assert np.asarray(to_rgb(Image.fromarray(values)))[..., 0].tolist() == [[0, 128, 255]]


# What a viewer does with each EXIF orientation, as numpy has it.
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_a_picture_is_turned_as_its_exif_tag_says(orientation, file_format):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(file_format, {})
    image = stored(Image.fromarray(pixels).convert("RGB"), file_format, exif=exif, **options)

    shown = np.asarray(displayed(image))[..., 0].astype(int)
    assert np.abs(shown - TURNS[orientation](pixels).astype(int)).max() <= 2


def turned_photo():
    """A photo of 9x6 that is displayed as 6x9."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return stored(Image.fromarray(200 * ONES), "PNG", exif=exif)


def test_a_mask_drawn_on_the_displayed_picture_turns_the_picture():
    image, mask = align(turned_photo(), Image.fromarray(np.rot90(ONES, -1).copy()))

    assert np.asarray(image).tolist() == (200 * np.rot90(ONES, -1)).tolist()
    assert np.asarray(mask).tolist() == np.rot90(ONES, -1).tolist()


def test_a_mask_drawn_on_the_stored_picture_leaves_it():
    image, mask = align(turned_photo(), Image.fromarray(ONES))

    assert np.asarray(image).tolist() == (200 * ONES).tolist()
    assert np.asarray(mask).tolist() == ONES.tolist()


def test_a_mask_that_carries_the_tag_is_turned_too():
    image, mask = align(turned_photo(), turned_photo())

    assert np.asarray(image).tolist() == np.asarray(mask).tolist() == (200 * np.rot90(ONES, -1)).tolist()


def test_a_mask_of_another_size_is_refused_with_both():
    with pytest.raises(ValueError, match=r"mask is 5x5 but its image is 6x9 \(width x height\): export"):
        align(turned_photo(), Image.new("L", (5, 5)))


def test_shrinking_averages_the_image_and_keeps_ids_whole():
    image = Image.fromarray(np.array([[0, 200] * 4] * 8, np.uint8)).convert("RGB")
    label = np.repeat(np.array([[3] * 4 + [7] * 4], np.uint8), 8, axis=0)

    small, small_label = shrink(image, label, 4)
    assert small.size == (4, 4)
    assert np.abs(np.asarray(small).astype(int) - 100).max() < 30
    assert small_label.tolist() == [[3, 3, 7, 7]] * 4
    assert shrink(image, label, None)[0] is image
