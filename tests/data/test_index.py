import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from svf_lightning.data import images
from svf_lightning.data import index as index_module
from svf_lightning.data.images import decode_label, read_image
from svf_lightning.data.index import build_index

CLASS_NAMES = ("square", "circle", "star")


def write_pair(folder: Path, name: str, label: np.ndarray) -> tuple[Path, Path]:
    image_path, label_path = folder / f"{name}.jpg", folder / f"{name}.png"
    Image.new("RGB", label.shape[::-1], (200, 30, 90)).save(image_path)
    Image.fromarray(label).save(label_path)
    return image_path, label_path


@pytest.fixture(autouse=True)
def _own_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))


@pytest.fixture
def pairs(tmp_path) -> list[tuple[Path, Path]]:
    first = np.array([[0, 0, 1, 1], [0, 255, 1, 1], [3, 255, 1, 1]], np.uint8)
    second = np.zeros((4, 5), np.uint8)
    return [write_pair(tmp_path, "first", first), write_pair(tmp_path, "second", second)]


def build(pairs, tmp_path):
    return build_index("shapes", CLASS_NAMES, pairs, cache=tmp_path / "index.npz", workers=2)


@pytest.fixture
def counting(monkeypatch) -> list[int]:
    """Grows by one entry whenever files are decoded for counting."""
    counted: list[int] = []
    original = index_module._count_all

    def count_all(name, paths, count, workers):
        counted.append(len(paths))
        return original(name, paths, count, workers)

    monkeypatch.setattr(index_module, "_count_all", count_all)
    return counted


def test_an_index_counts_the_pixels_of_every_class_but_not_ignored_ones(pairs, tmp_path):
    index = build(pairs, tmp_path)

    assert index.pixels.dtype == np.int64
    assert index.pixels.tolist() == [[3, 6, 0, 1], [20, 0, 0, 0]]
    assert index.ids == ("first", "second")
    assert index.class_names == CLASS_NAMES
    assert len(index) == 2


def test_a_pickled_index_reads_the_same_pair(pairs, tmp_path):
    image, label = pickle.loads(pickle.dumps(build(pairs, tmp_path))).read(0)

    assert image.shape == (3, 3, 4)
    assert image.dtype == label.dtype == torch.uint8
    assert label.tolist() == [[0, 0, 1, 1], [0, 255, 1, 1], [3, 255, 1, 1]]


def test_an_image_is_read_as_rgb_whatever_its_mode(tmp_path):
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [10, 20, 30]]], np.uint8)
    Image.fromarray(colours).save(tmp_path / "rgb.png")
    Image.fromarray(colours).convert("RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(colours).quantize(4).save(tmp_path / "palette.png")
    Image.fromarray(colours[..., 0]).save(tmp_path / "grey.png")

    wanted = torch.from_numpy(colours).permute(2, 0, 1)
    for name in ("rgb", "rgba", "palette"):
        torch.testing.assert_close(read_image(tmp_path / f"{name}.png"), wanted, atol=0, rtol=0)
    assert read_image(tmp_path / "grey.png").tolist() == [[[255, 0], [0, 10]]] * 3


def test_a_palette_label_gives_ids_and_not_colours(tmp_path):
    ids = np.array([[0, 1, 2], [20, 255, 255]], np.uint8)
    label = Image.fromarray(ids)
    label.putpalette(bytes((7 * i + c) % 256 for i in range(256) for c in (3, 90, 180)))
    label.save(tmp_path / "label.png")

    assert Image.open(tmp_path / "label.png").mode == "P"
    assert decode_label(tmp_path / "label.png").tolist() == ids.tolist()


def test_a_label_of_one_bit_per_pixel_gives_0_and_255(tmp_path):
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "label.png")

    assert decode_label(tmp_path / "label.png").tolist() == [[0, 255]]


def test_a_colour_label_is_refused_with_its_mode(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "label.png")

    with pytest.raises(ValueError, match=r"label\.png has mode RGB, .* 8-bit greyscale or palette PNG"):
        decode_label(tmp_path / "label.png")


@pytest.mark.parametrize("read", [read_image, decode_label])
def test_a_missing_file_is_named(read, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.png is missing: put it back"):
        read(tmp_path / "gone.png")


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_a_truncated_image_is_named(ending, tmp_path):
    path = tmp_path / f"cut.{ending}"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    with pytest.raises(ValueError, match=rf"cut\.{ending} cannot be decoded .*replace it by an intact copy"):
        read_image(path)


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>404</html>")

    with pytest.raises(ValueError, match=r"page\.jpg cannot be decoded \(not an image\)"):
        read_image(tmp_path / "page.jpg")


def test_all_bad_files_are_reported_at_once(pairs, tmp_path):
    pairs.append(write_pair(tmp_path, "third", np.zeros((4, 5), np.uint8)))
    (tmp_path / "first.jpg").unlink()
    (tmp_path / "second.png").write_bytes(b"no image")
    Image.new("RGB", (9, 4)).save(tmp_path / "third.jpg")

    with pytest.raises(ValueError, match="shapes: 3 files cannot be used") as caught:
        build(pairs, tmp_path)
    message = str(caught.value)
    assert "first.jpg is missing" in message
    assert "second.png cannot be decoded" in message
    assert "third.png is 5x4 but its image third.jpg is 9x4 (width x height)" in message
    assert "\n" not in message


def test_an_unreadable_image_with_a_good_label_is_found_by_the_index(pairs, tmp_path):
    path = tmp_path / "second.jpg"
    path.write_bytes(path.read_bytes()[:-40])

    with pytest.raises(ValueError, match=r"second\.jpg cannot be decoded"):
        build(pairs, tmp_path)


def test_missing_files_are_a_file_error_that_shows_ten_and_counts_the_rest(tmp_path):
    pairs = [(tmp_path / f"{i}.jpg", tmp_path / f"{i}.png") for i in range(8)]

    with pytest.raises(FileNotFoundError, match=r"16 files cannot be used: .*; and 6 more$") as caught:
        build(pairs, tmp_path)
    assert str(caught.value).count("is missing") == 10


def test_unknown_ids_are_named_with_their_file(pairs, tmp_path):
    pairs.append(write_pair(tmp_path, "odd", np.array([[0, 4, 254, 255]], np.uint8)))

    with pytest.raises(ValueError, match=re.escape("odd.png holds the ids 4, 254, but labels hold 0..3")):
        build(pairs, tmp_path)


def test_an_empty_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match="shapes: the list of images is empty"):
        build([], tmp_path)


def test_a_second_start_counts_nothing(pairs, tmp_path, counting):
    first = build(pairs, tmp_path)
    second = build(pairs, tmp_path)

    assert counting == [2]
    assert second.pixels.tolist() == first.pixels.tolist()
    assert not list(tmp_path.glob(".index*"))  # no temporary file is left


def test_a_changed_label_is_counted_again(pairs, tmp_path, counting):
    build(pairs, tmp_path)
    before = os.stat(pairs[1][1])
    write_pair(tmp_path, "second", np.full((4, 5), 2, np.uint8))
    os.utime(pairs[1][1], ns=(before.st_atime_ns, before.st_mtime_ns + 1))

    assert build(pairs, tmp_path).pixels[1].tolist() == [0, 0, 20, 0]
    assert counting == [2, 2]


def test_a_label_that_went_missing_is_found_in_spite_of_the_cache(pairs, tmp_path):
    build(pairs, tmp_path)
    pairs[0][1].unlink()

    with pytest.raises(FileNotFoundError, match=r"first\.png is missing"):
        build(pairs, tmp_path)


def test_a_changed_list_is_counted_again(pairs, tmp_path, counting):
    build(pairs, tmp_path)

    assert build(pairs[::-1], tmp_path).pixels[0].tolist() == [20, 0, 0, 0]
    assert counting == [2, 2]


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 half a zip"])
def test_a_corrupt_cache_is_counted_again_and_mended(pairs, tmp_path, counting, content):
    (tmp_path / "index.npz").write_bytes(content)

    assert build(pairs, tmp_path).pixels[0].tolist() == [3, 6, 0, 1]
    build(pairs, tmp_path)
    assert counting == [2]


def test_a_cache_with_pickled_objects_is_not_unpickled(pairs, tmp_path, counting):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    np.savez(tmp_path / "index.npz", key=np.array(Trap(), dtype=object), pixels=np.zeros((2, 4), np.int64))

    build(pairs, tmp_path)
    assert counting == [2]
    assert not (tmp_path / "sprung").exists()


def refuse_writes_to(folder: Path, monkeypatch) -> None:
    """As a read-only folder does; permissions alone would not stop root, whom CI often runs as."""
    replace = os.replace

    def guarded(source, target):
        if Path(target).parent == folder:
            raise PermissionError(13, "Permission denied", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", guarded)


def test_a_read_only_data_folder_keeps_its_index_in_the_user_cache(pairs, tmp_path, counting, monkeypatch):
    refuse_writes_to(tmp_path, monkeypatch)

    build(pairs, tmp_path)
    assert build(pairs, tmp_path).pixels[0].tolist() == [3, 6, 0, 1]
    assert counting == [2]
    assert not (tmp_path / "index.npz").exists()


def test_an_index_that_can_be_kept_nowhere_is_only_a_warning(pairs, tmp_path, monkeypatch, caplog):
    refuse_writes_to(tmp_path, monkeypatch)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))

    assert build(pairs, tmp_path).pixels[0].tolist() == [3, 6, 0, 1]
    assert "the next start will count again" in caplog.text


def test_headers_alone_find_files_that_are_cut_short_or_no_images(pairs, tmp_path):
    pairs += [write_pair(tmp_path, f"more{i}", np.zeros((40, 50), np.uint8)) for i in range(3)]
    (tmp_path / "first.jpg").write_bytes(b"")
    (tmp_path / "second.jpg").write_text("<html>404</html>")
    cut = tmp_path / "more0.jpg"
    cut.write_bytes(cut.read_bytes()[:-60])
    (tmp_path / "more1.jpg").unlink()

    with pytest.raises(ValueError, match="shapes: 4 files cannot be used") as caught:
        build_index("shapes", CLASS_NAMES, pairs, cache=tmp_path / "index.npz", whole_images=False)
    for name in ("first.jpg", "second.jpg", "more0.jpg", "more1.jpg"):
        assert name in str(caught.value)


def test_headers_alone_find_a_label_of_another_size_and_decode_no_image(pairs, tmp_path, monkeypatch):
    with (tmp_path / "second.jpg").open("ab") as file:
        file.write(b"camera's notes")  # behind the end of the picture, as some files have it
    decoded = []
    open_image = images.open_image
    monkeypatch.setattr(images, "open_image", lambda path: decoded.append(path) or open_image(path))
    options = {"cache": tmp_path / "index.npz", "whole_images": False}

    assert build_index("shapes", CLASS_NAMES, pairs, **options).pixels.tolist() == [
        [3, 6, 0, 1],
        [20, 0, 0, 0],
    ]
    assert {Path(path).suffix for path in decoded} == {".png"}
    Image.new("RGB", (9, 4)).save(tmp_path / "second.jpg")
    with pytest.raises(ValueError, match=r"second\.png is 5x4 but its image second\.jpg is 9x4"):
        build_index("shapes", CLASS_NAMES, pairs, **options)
