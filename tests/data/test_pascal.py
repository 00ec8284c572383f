import pickle

import pytest

from svf_lightning.data.pascal import Pascal, voc_palette
from tests.made_voc import make_voc


@pytest.fixture
def voc(tmp_path):
    """The root of a made VOC folder, and the labels that were written there."""
    root = tmp_path / "VOC2012"
    return root, make_voc(root)


@pytest.mark.parametrize(("split", "year"), [("train", "2007"), ("val", "2008")])
def test_an_index_reads_every_listed_label_as_it_was_written(voc, split, year):
    root, labels = voc
    source = Pascal(root)
    source.ensure()

    index = source.index(split)

    assert list(index.ids) == [name for name in labels if name.startswith(year)]
    for i, name in enumerate(index.ids):
        image, label = index.read(i)
        assert label.tolist() == labels[name].tolist()
        assert image.shape == (3, *labels[name].shape)
        assert index.pixels[i].tolist() == [(labels[name] == class_id).sum() for class_id in range(21)]


def test_folds_are_those_of_pascal(voc):
    assert Pascal(voc[0]).classes(2)[1] == (11, 12, 13, 14, 15)


def test_min_pixels_are_those_of_the_published_protocol():
    assert Pascal("anywhere").min_pixels == 2048


def test_a_source_can_be_pickled(voc):
    assert pickle.loads(pickle.dumps(Pascal(voc[0]))) == Pascal(voc[0])


def test_missing_parts_are_listed_with_what_to_fetch(voc):
    root, _ = voc
    (root / "ImageSets/Segmentation/voc_sbd_merge_noduplicate.txt").unlink()
    (root / "SegmentationClassAug").rename(root / "elsewhere")

    with pytest.raises(FileNotFoundError) as caught:
        Pascal(root).ensure()
    message = str(caught.value)
    assert message.startswith(
        "no SegmentationClassAug, ImageSets/Segmentation/voc_sbd_merge_noduplicate.txt under "
        f"root={root}. Fetch VOCtrainval_11-May-2012.tar of VOC 2012 and benchmark.tgz of SBD"
    )
    assert (
        f"`svf prepare pascal --voc VOCtrainval_11-May-2012.tar --sbd benchmark.tgz --out {root}`" in message
    )


def test_a_root_that_is_too_high_is_answered_with_the_right_one(tmp_path):
    make_voc(tmp_path / "VOCdevkit/VOC2012")

    with pytest.raises(FileNotFoundError, match=r"VOCdevkit/VOC2012$"):
        Pascal(tmp_path).ensure()


def test_a_missing_list_is_named(voc):
    with pytest.raises(FileNotFoundError, match=r"no list mine\.txt under root=.*check root"):
        Pascal(voc[0], train_list="mine.txt").index("train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n \n", r"mine\.txt lists no images"),
        ("2007_000000\na b c\n", r"mine\.txt, line 2: 3 words, but a line is an image id or"),
        ("2007_000000\n2007_000001\n2007_000000\n", r"mine\.txt lists 2007_000000\.jpg twice"),
    ],
)
def test_a_bad_list_is_refused_by_name(voc, text, message):
    root, _ = voc
    (root / "mine.txt").write_text(text)

    with pytest.raises(ValueError, match=message):
        Pascal(root, train_list="mine.txt").index("train")


def test_a_list_may_have_blank_lines_and_windows_line_ends(voc):
    root, _ = voc
    (root / "mine.txt").write_bytes(
        b"2007_000001\r\n\r\nJPEGImages/2007_000002.jpg SegmentationClassAug/2007_000002.png\r\n"
    )

    assert Pascal(root, val_list="mine.txt").index("val").ids == ("2007_000001", "2007_000002")


def test_a_listed_image_that_is_missing_is_named(voc):
    root, _ = voc
    (root / "JPEGImages/2007_000003.jpg").unlink()

    with pytest.raises(FileNotFoundError, match=r"2007_000003\.jpg is missing"):
        Pascal(root).index("train")


def test_an_unknown_split_is_refused(voc):
    with pytest.raises(ValueError, match="split is 'test'"):
        Pascal(voc[0]).index("test")


def test_the_palette_shows_the_colours_of_the_voc_development_kit():
    palette = voc_palette()
    colours = [tuple(palette[3 * i : 3 * i + 3]) for i in range(256)]

    # from the table of the kit: background, aeroplane, bicycle, bird, person, tvmonitor, void
    assert colours[0] == (0, 0, 0)
    assert colours[1:4] == [(128, 0, 0), (0, 128, 0), (128, 128, 0)]
    assert colours[15] == (192, 128, 128)
    assert colours[20] == (0, 64, 128)
    assert colours[255] == (224, 224, 192)
    assert len(set(colours)) == 256
