"""`svf prepare`: from archives in the true layouts to episodes, and what goes wrong on the way."""

import hashlib
import io
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from svf_lightning.cli import app
from svf_lightning.data import index as index_module
from svf_lightning.data import prepare as prepare_module
from svf_lightning.data.coco import Coco
from svf_lightning.data.episodes import EpisodeDataset, class_lists
from svf_lightning.data.images import decode_label
from svf_lightning.data.pascal import Pascal
from svf_lightning.data.prepare import COCO_IMAGES, PASCAL_FOLD_IMAGES, prepare_coco, prepare_pascal
from tests.made_coco import make_coco
from tests.made_voc import make_archives

TRAIN = [f"2007_{i:06d}" for i in range(8)]
VAL = [f"2008_{i:06d}" for i in range(8)]
SBD = [f"2010_{i:06d}" for i in range(6)]  # the other two are of VOC's Main/val.txt


@pytest.fixture(scope="module")
def voc_folders(tmp_path_factory):
    """VOCdevkit and benchmark_RELEASE, to be left as they are."""
    return make_archives(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def voc_archives(voc_folders):
    """The same as archives, of names whose checksum is not known."""
    voc, sbd = voc_folders
    paths = voc.parent / "voc.tar", voc.parent / "sbd.tgz"
    for path, folder, mode in zip(paths, (voc, sbd), ("w", "w:gz"), strict=True):
        with tarfile.open(path, mode) as archive:
            archive.add(folder, folder.name)
    return paths


@pytest.fixture(scope="module")
def coco_archives(tmp_path_factory):
    """train2014.zip, val2014.zip and annotations_trainval2014.zip."""
    root = tmp_path_factory.mktemp("made")
    make_coco(root / "coco", images=6)
    for name, place in (("train2014", "train2014"), ("val2014", "val2014"), ("annotations", "annotations")):
        archive = f"{name}_trainval2014" if name == "annotations" else name
        shutil.make_archive(str(root / archive), "zip", root / "coco", place)
    return [root / "train2014.zip", root / "val2014.zip"], [root / "annotations_trainval2014.zip"]


@pytest.fixture(autouse=True)
def _own_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))


def files(folder: Path) -> dict[str, bytes]:
    """Every file under a folder but the index, whose times of change differ."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".npz")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def count_written(
    monkeypatch, stop_after: float = float("inf"), error: BaseException | None = None
) -> list[str]:
    """The names of the files that are put in place; raises ``error`` instead of one more."""
    written: list[str] = []
    replace = index_module.os.replace

    def counted(source, target):
        if len(written) >= stop_after:
            raise error
        written.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(index_module.os, "replace", counted)
    return written


# PASCAL-5i


def test_archives_become_the_list_that_the_field_trains_on(voc_archives, tmp_path):
    counts = prepare_pascal(*voc_archives, tmp_path / "VOC2012")
    source = Pascal(tmp_path / "VOC2012")
    source.ensure()

    # VOC train, and behind it what SBD labels of VOC's Main/train.txt; nothing of val, though SBD labels some
    assert source.index("train").ids == (*TRAIN, *SBD)
    assert source.index("val").ids == tuple(VAL)
    assert [(c.found, c.published) for c in counts[:4]] == [(8, 1464), (10, 5623), (14, 5953), (8, 1449)]


def test_labels_are_vocs_own_where_there_is_one_and_else_sbds(voc_archives, tmp_path):
    prepare_pascal(*voc_archives, tmp_path)
    labels = {path.stem: decode_label(path) for path in (tmp_path / "SegmentationClassAug").iterdir()}

    assert set(labels) == {*TRAIN, *VAL, *(f"2010_{i:06d}" for i in range(8))}
    for i, name in enumerate(TRAIN):
        assert np.unique(labels[name]).tolist() == [0, i % 20 + 1, 255]  # SBD says 1 everywhere
    for i, name in enumerate(SBD):
        assert np.unique(labels[name]).tolist() == [0, i % 20 + 1]  # SBD has no ignored outline
        assert labels[name].shape == (48, 64)
        assert (labels[name] > 0).sum() == 38 * 54


def test_folders_give_what_archives_give(voc_folders, voc_archives, tmp_path):
    prepare_pascal(*voc_archives, tmp_path / "a")
    prepare_pascal(*voc_folders, tmp_path / "b")
    prepare_pascal(voc_folders[0] / "VOC2012", voc_folders[1] / "dataset", tmp_path / "c")

    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")


def test_an_unpacked_voc_may_be_completed_in_place(voc_folders, voc_archives, tmp_path):
    prepare_pascal(*voc_archives, tmp_path / "elsewhere")
    shutil.copytree(voc_folders[0], tmp_path / "VOCdevkit")
    root = tmp_path / "VOCdevkit/VOC2012"
    before = files(root)
    prepare_pascal(root, voc_folders[1], root)

    after = files(root)
    assert {name: after[name] for name in before} == before
    assert {**after, **files(tmp_path / "elsewhere")} == after


@pytest.mark.parametrize("fold", range(4))
def test_what_was_prepared_gives_episodes_of_disjoint_classes(voc_archives, tmp_path, fold):
    prepare_pascal(*voc_archives, tmp_path)
    source = Pascal(tmp_path)
    base, novel = source.classes(fold)
    train = source.index("train")
    listed = class_lists(train.pixels, base, min_pixels=source.min_pixels, novel_images="drop").any(axis=1)

    assert not train.pixels[listed][:, novel].any()
    assert sorted(base + novel) == list(range(1, 21))
    if fold == 3:  # the made classes are 1..8: none is novel, so none is dropped
        assert listed.all()
        dataset = EpisodeDataset(train, range(1, 7), 1, lambda i, m, g: (i, m), seed=0, min_pixels=2048)
        assert {dataset.draw(0, i).class_id for i in range(len(dataset))} == set(range(1, 7))


def test_the_published_numbers_are_those_of_the_protocol():
    # reference/protocol.md, section 2: with the training trick, without, test
    with_trick, without, test = zip(*PASCAL_FOLD_IMAGES, strict=True)
    assert with_trick == (4208, 3726, 2752, 4510)
    assert without == (4760, 4588, 4097, 5108)
    assert test == (364, 445, 592, 336)
    assert COCO_IMAGES["2014"] == (82081, 40137)
    assert COCO_IMAGES["2017"][1] == 4952
    assert sum(COCO_IMAGES["2017"]) == sum(COCO_IMAGES["2014"])  # the same images, shared out anew


def test_the_command_says_where_counts_differ_and_is_content(voc_archives, tmp_path, monkeypatch):
    voc, sbd = map(str, voc_archives)
    arguments = ["prepare", "pascal", "--voc", voc, "--sbd", sbd, "--out", str(tmp_path / "VOC2012")]
    result = CliRunner().invoke(app, arguments)

    assert result.exit_code == 0, result.output
    assert "training list, both without duplicates: 14 images, DIFFERS: published 5953" in result.output
    assert "fold 2, training, novel_images=drop: 14 images, DIFFERS: published 2752" in result.output
    assert "is ready: python train.py data=pascal data.source.root=" in result.output
    monkeypatch.setattr(prepare_module, "PASCAL_FOLD_IMAGES", ((14, 14, 0),) * 4)
    assert (
        "fold 2, training, novel_images=drop: 14 images, as published"
        in CliRunner().invoke(app, arguments).output
    )


def test_fold_counts_are_of_images_listed_under_the_rules(voc_archives, tmp_path):
    prepare_pascal(*voc_archives, tmp_path)
    counts = prepare_module._count_folds(Pascal(tmp_path))

    # classes by image: train 1..8, sbd 1..6; val 1..8. Of fold 0 (1..5) and fold 1 (6..10):
    found = [count.found for count in counts]
    assert found[:3] == [3 + 1, 3 + 1, 5]
    assert found[3:6] == [5 + 5, 5 + 5, 3]
    assert found[6:9] == [14, 14, 0]


def test_nothing_is_written_a_second_time(voc_archives, tmp_path, monkeypatch):
    prepare_pascal(*voc_archives, tmp_path)
    before = files(tmp_path)
    written = count_written(monkeypatch)
    prepare_pascal(*voc_archives, tmp_path)

    assert written == ["voc_sbd_merge_noduplicate.txt"]
    assert files(tmp_path) == before


@pytest.mark.parametrize("stop_after", [0, 5, 30, 45])
def test_an_interrupted_start_goes_on_where_it_stopped(voc_archives, tmp_path, monkeypatch, stop_after):
    whole = tmp_path / "whole"
    with monkeypatch.context() as patch:
        everything = count_written(patch)
        prepare_pascal(*voc_archives, whole)
    interrupted = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        first = count_written(patch, stop_after, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare_pascal(*voc_archives, interrupted)
    with pytest.raises(FileNotFoundError, match="svf prepare pascal"):  # counts as absent meanwhile
        Pascal(interrupted).ensure()
    assert not [name for name in files(interrupted) if Path(name).name.startswith(".")]
    second = count_written(monkeypatch)
    prepare_pascal(*voc_archives, interrupted)

    assert len(first) == stop_after
    assert not set(first) & set(second)
    assert sorted([*first, *second]) == sorted(everything)
    assert files(interrupted) == files(whole)


@pytest.mark.parametrize("place", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("which", [0, 1])
def test_a_truncated_archive_is_named_and_mended_by_a_whole_one(voc_archives, tmp_path, which, place):
    cut = tmp_path / voc_archives[which].name
    content = voc_archives[which].read_bytes()
    cut.write_bytes(content[: int(len(content) * place)])
    given = [*voc_archives]
    given[which] = cut

    with pytest.raises(ValueError, match=rf"{cut.name}.* (cut short|lacks)") as caught:
        prepare_pascal(*given, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out/ImageSets/Segmentation/voc_sbd_merge_noduplicate.txt").exists()
    prepare_pascal(*voc_archives, tmp_path / "out")
    assert len(Pascal(tmp_path / "out").index("train")) == 14


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "page.tar",
            b"<html>404</html>" * 99,
            r"page\.tar is cut short, damaged or no archive \(neither tar nor zip\)",
        ),
        ("nothing.tgz", b"", r"nothing\.tgz is empty, 0 bytes: fetch it again"),
        ("cut.zip", b"PK\x03\x04 half a zip", r"cut\.zip is cut short, damaged or no archive"),
    ],
)
def test_a_file_that_is_no_archive_is_named(voc_archives, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ValueError, match=message):
        prepare_pascal(tmp_path / name, voc_archives[1], tmp_path / "out")


def test_a_wrong_archive_is_answered_with_the_right_one(voc_archives, tmp_path):
    voc, sbd = voc_archives
    with pytest.raises(
        ValueError, match=r"sbd\.tgz holds no JPEGImages/\*\.jpg or .*: give VOCtrainval_11-May-2012"
    ):
        prepare_pascal(sbd, sbd, tmp_path / "out")
    with pytest.raises(ValueError, match=r"voc\.tar holds no cls/\*\.mat: give benchmark\.tgz of SBD"):
        prepare_pascal(voc, voc, tmp_path / "out")


def test_a_folder_with_two_vocs_is_refused(voc_folders, tmp_path):
    for year in ("VOC2012", "VOC2012_copy"):
        shutil.copytree(voc_folders[0] / "VOC2012", tmp_path / "VOCdevkit" / year)

    with pytest.raises(ValueError, match=r"holds both VOCdevkit/VOC2012.* and VOCdevkit/.*: give"):
        prepare_pascal(tmp_path / "VOCdevkit", voc_folders[1], tmp_path / "out")


def test_a_published_archive_is_compared_with_its_checksum(voc_archives, tmp_path, monkeypatch):
    for name, path in zip(prepare_module.MD5, voc_archives, strict=True):
        shutil.copyfile(path, tmp_path / name)
    given = [tmp_path / name for name in prepare_module.MD5]

    with pytest.raises(
        ValueError, match=r"VOCtrainval_11-May-2012\.tar is not the published file \(MD5 .* instead of 6cd6"
    ):
        prepare_pascal(*given, tmp_path / "out")
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in given}
    monkeypatch.setattr(prepare_module, "MD5", sums)
    assert prepare_pascal(*given, tmp_path / "out")[2].found == 14


def test_a_missing_source_is_named(voc_archives, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.tar is missing: give the archive, or the folder"):
        prepare_pascal(tmp_path / "gone.tar", voc_archives[1], tmp_path / "out")


def test_an_archive_that_may_not_be_read_is_named(voc_archives, tmp_path, monkeypatch):
    opened = Path.open

    def refuse(path, *arguments, **options):
        if path.name == "voc.tar":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)  # root, whom CI runs as, may read anything
    with pytest.raises(ValueError, match=r"voc\.tar may not be read \(permission denied\): allow it"):
        prepare_pascal(*voc_archives, tmp_path / "out")


def test_a_folder_that_may_not_be_read_is_named(voc_folders, tmp_path, monkeypatch):
    def refuse(folder, onerror):
        onerror(PermissionError(13, "Permission denied", f"{folder}/JPEGImages"))
        return iter(())

    monkeypatch.setattr(prepare_module.os, "walk", refuse)
    with pytest.raises(ValueError, match=r"VOCdevkit/JPEGImages may not be read"):
        prepare_pascal(*voc_folders, tmp_path / "out")


@pytest.mark.parametrize("stop_after", [3, 20, 35])
def test_a_full_disk_is_told_and_leaves_nothing_half_written(voc_archives, tmp_path, monkeypatch, stop_after):
    written = count_written(monkeypatch, stop_after, OSError(28, "No space left on device"))

    with pytest.raises(
        ValueError, match=r"out cannot be written \(No space left on device\): make room"
    ) as caught:
        prepare_pascal(*voc_archives, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(Path(name).name for name in files(tmp_path / "out")) == sorted(written)


def test_an_out_that_may_not_be_written_is_told(voc_archives, tmp_path, monkeypatch):
    def refuse(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match=r"out cannot be written \(Permission denied\)"):
        prepare_pascal(*voc_archives, tmp_path / "out")


def test_an_out_that_is_a_file_is_told(voc_archives, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match=r"out cannot be written \(.*\): make room or name another folder"):
        prepare_pascal(*voc_archives, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("JPEGImages/2007_000003.jpg", r"lists 2007_000003 but lacks its JPEGImages/2007_000003\.jpg"),
        ("JPEGImages/2010_000002.jpg", r"lists 2010_000002 but lacks its JPEGImages/2010_000002\.jpg"),
        (
            "SegmentationClass/2008_000007.png",
            r"lists 2008_000007 but lacks its SegmentationClassAug/2008_000007\.png",
        ),
        ("ImageSets/Main/train.txt", r"there is no ImageSets/Main/train\.txt in the VOC source"),
        ("ImageSets/Segmentation/val.txt", r"there is no ImageSets/Segmentation/val\.txt in the VOC source"),
    ],
)
def test_a_part_that_is_missing_is_named(voc_folders, tmp_path, name, message):
    shutil.copytree(voc_folders[0], tmp_path / "VOCdevkit")
    (tmp_path / "VOCdevkit/VOC2012" / name).unlink()

    with pytest.raises(ValueError, match=message):
        prepare_pascal(tmp_path / "VOCdevkit", voc_folders[1], tmp_path / "out")


@pytest.mark.parametrize("damage", ["cut", "empty", "field", "values", "kind"])
def test_a_damaged_mask_of_sbd_is_named(voc_folders, tmp_path, damage):
    from scipy.io import savemat

    shutil.copytree(voc_folders[1], tmp_path / "sbd")
    path = tmp_path / "sbd/dataset/cls/2010_000001.mat"
    label = np.zeros((48, 64), np.uint8)
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:-40])
        case "empty":
            path.write_bytes(b"")
        case "field":
            savemat(path, {"GTinst": {"Segmentation": label}})
        case "values":
            savemat(path, {"GTcls": {"Segmentation": label + 21}})
        case "kind":
            savemat(path, {"GTcls": {"Segmentation": label.astype(float)}})

    with pytest.raises(ValueError, match=r"2010_000001\.mat cannot be used: .*fetch it again") as caught:
        prepare_pascal(voc_folders[0], tmp_path / "sbd", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_damaged_masks_of_sbd_are_counted_and_stop_no_other(voc_folders, tmp_path):
    shutil.copytree(voc_folders[1], tmp_path / "sbd")
    for number in (1, 3):
        (tmp_path / f"sbd/dataset/cls/2010_{number:06d}.mat").write_bytes(b"")

    with pytest.raises(ValueError, match=r"\(and 1 more of 16 files\).*the 14 others are in place"):
        prepare_pascal(voc_folders[0], tmp_path / "sbd", tmp_path / "out")

    converted = {path.stem for path in (tmp_path / "out/SegmentationClassAug").glob("2010_*.png")}
    assert converted == {f"2010_{i:06d}" for i in (0, 2, 4, 5, 6, 7)}


def test_an_archive_cannot_write_outside_of_its_folder(voc_folders, tmp_path):
    evil = tmp_path / "evil.tar"
    picture = io.BytesIO()
    Image.new("RGB", (9, 9)).save(picture, "JPEG")
    with tarfile.open(evil, "w") as archive:
        archive.add(voc_folders[0], "VOCdevkit")
        for name in ("../../JPEGImages/up.jpg", "/JPEGImages/root.jpg", "JPEGImages/../../beside.jpg"):
            entry = tarfile.TarInfo(name)
            entry.size = len(picture.getvalue())
            archive.addfile(entry, io.BytesIO(picture.getvalue()))
        for name, kind in (
            ("JPEGImages/soft.jpg", tarfile.SYMTYPE),
            ("JPEGImages/hard.jpg", tarfile.LNKTYPE),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
    out = tmp_path / "deep/down/out"
    before = {path for path in tmp_path.rglob("*") if out not in path.parents}
    prepare_pascal(evil, voc_folders[1], out)

    assert {path for path in tmp_path.rglob("*") if out not in path.parents} - before == {
        out,
        out.parent,
        out.parent.parent,
    }
    assert not Path("/JPEGImages").exists()
    assert not [
        path for path in out.rglob("*") if path.is_symlink() or path.stem in ("soft", "hard", "beside")
    ]


def test_scipy_is_asked_for_by_its_command(voc_archives, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)

    with pytest.raises(
        ValueError, match=r"scipy.* is not installed: `pip install 'svf-lightning\[prepare\]'`"
    ):
        prepare_pascal(*voc_archives, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# COCO-20i


def test_coco_archives_and_folders_become_the_same(coco_archives, tmp_path):
    images, annotations = coco_archives
    counts = prepare_coco(images, annotations, tmp_path / "a")
    made = images[0].parent / "coco"
    prepare_coco([made / "train2014", made / "val2014"], [made / "annotations"], tmp_path / "b")
    prepare_coco([made], sorted((made / "annotations").iterdir()), tmp_path / "c")

    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")
    assert [(c.found, c.published) for c in counts] == [(6, 82081), (6, 40137)]
    index = Coco(tmp_path / "a").index("train")
    assert index.pixels[:, 1:].any(axis=1).all()


def test_coco_may_be_prepared_in_place(coco_archives, tmp_path):
    root = tmp_path / "coco"
    shutil.copytree(coco_archives[0][0].parent / "coco", root)
    before = files(root)
    prepare_coco([root], [root], root)

    after = files(root)
    assert {name: after[name] for name in before} == before
    assert len([name for name in after if name.startswith("labels/")]) == 6 + 6 + 2


def test_the_coco_command_prepares_and_counts(coco_archives, tmp_path):
    images, annotations = coco_archives
    options = [*(o for path in images for o in ("--images", str(path))), "--annotations", str(annotations[0])]
    result = CliRunner().invoke(app, ["prepare", "coco", *options, "--out", str(tmp_path / "coco")])

    assert result.exit_code == 0, result.output
    assert "val2014 with objects: 6 images, DIFFERS: published 40137" in result.output
    assert f"python train.py data=coco data.source.root={tmp_path}" in result.output


def test_a_wrong_option_of_the_command_ends_in_one_line(coco_archives, tmp_path):
    images, annotations = coco_archives
    command = [
        "prepare",
        "coco",
        "--images",
        str(images[0]),
        "--annotations",
        str(annotations[0]),
        "--year",
        "2016",
    ]
    result = CliRunner().invoke(app, command)

    assert result.exit_code == 1
    assert result.output.splitlines() == ["error: year is '2016'; COCO-20i is drawn from 2014 or 2017"]


def test_coco_goes_on_where_it_stopped(coco_archives, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        first = count_written(patch, 12, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare_coco(*coco_archives, tmp_path)
    with monkeypatch.context() as patch:
        second = count_written(patch)
        prepare_coco(*coco_archives, tmp_path)

    pictures = [name for name in (*first, *second) if name.endswith(".jpg")]
    assert len(first) == 12
    assert len(pictures) == len(set(pictures)) == 7 + 7
    assert len(Coco(tmp_path).index("val")) == 6


def test_images_without_annotations_are_told(coco_archives, tmp_path):
    images, annotations = coco_archives
    one = tmp_path / "instances_train2014.json"
    with zipfile.ZipFile(annotations[0]) as archive:
        one.write_bytes(archive.read("annotations/instances_train2014.json"))

    with pytest.raises(FileNotFoundError, match=r"no annotations/instances_val2014\.json under root="):
        prepare_coco(images, [one], tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"train2014\.zip holds no instances_\(train\|val\)2014\.json: give annot"
    ):
        prepare_coco(images, [images[0]], tmp_path / "other")


def test_annotations_without_images_are_told(coco_archives, tmp_path):
    images, annotations = coco_archives

    with pytest.raises(FileNotFoundError, match=r"no val2014 under root="):
        prepare_coco(images[:1], annotations, tmp_path)
    with pytest.raises(
        ValueError, match=r"annotations_trainval2014\.zip holds no train2014/\*\.jpg or val2014/"
    ):
        prepare_coco(annotations, annotations, tmp_path)


def test_a_damaged_file_in_a_zip_is_found_by_its_checksum(coco_archives, tmp_path):
    images, annotations = coco_archives
    damaged = tmp_path / "train2014.zip"
    content = bytearray(images[0].read_bytes())
    with zipfile.ZipFile(images[0]) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith(".jpg"))
    content[entry.header_offset + 600] ^= 255
    damaged.write_bytes(content)

    with pytest.raises(ValueError, match=r"train2014\.zip is cut short, damaged or no archive"):
        prepare_coco([damaged, images[1]], annotations, tmp_path / "out")
    assert Path(entry.filename).name not in [Path(name).name for name in files(tmp_path / "out")]


def test_a_truncated_annotation_file_is_named(coco_archives, tmp_path):
    images, annotations = coco_archives
    path = tmp_path / "instances_train2014.json"
    with zipfile.ZipFile(annotations[0]) as archive:
        path.write_bytes(archive.read("annotations/instances_train2014.json")[:-50])
        (tmp_path / "instances_val2014.json").write_bytes(archive.read("annotations/instances_val2014.json"))

    with pytest.raises(ValueError, match=r"instances_train2014\.json is damaged"):
        prepare_coco(images, [path, tmp_path / "instances_val2014.json"], tmp_path / "out")
    assert json.loads((tmp_path / "instances_val2014.json").read_bytes())  # the sources are left alone
    assert os.stat(path).st_size
