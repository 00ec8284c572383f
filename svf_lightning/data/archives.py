"""Unpack published archives: tar and zip files, or the folders that they unpack to.

Every file is written under another name and then renamed, and one that is there with its full size is not
written again. So an interrupted start goes on where it stopped. Nothing is put where an archive says: only
file names that are looked for are taken, and only the last part of their path.
"""

import hashlib
import lzma
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from svf_lightning.files import replace_file
from svf_lightning.progress import Progress, track

MEGABYTE = 2**20


# Tars have no checksums of what is in them; files of a zip have, and `zipfile` compares them.
MD5 = {
    "VOCtrainval_11-May-2012.tar": "6cd6e144f989b92b3379bac3b3de84fd",
    "benchmark.tgz": "82b4d87ceb2ed10f6038a1cba92111cb",
}


class Member(NamedTuple):
    """A file of an archive or folder."""

    name: str  # with folders, separated by /
    size: int  # in bytes
    read: Callable[[], bytes]
    path: Path | None  # where it lies, if not in an archive


def check_archive(source: Path) -> None:
    """Refuse a source that is not there, and an archive of a known name that is not the published one."""
    if not source.exists():
        raise FileNotFoundError(f"{source} is missing: give the archive, or the folder that it unpacks to")
    if source.name not in MD5 or source.is_dir():
        return
    digest = hashlib.md5(usedforsecurity=False)
    with reading(source), source.open("rb") as file:
        blocks = iter(lambda: file.read(MEGABYTE), b"")
        for block in track(blocks, f"checking {source.name}", source.stat().st_size // MEGABYTE, "MB"):
            digest.update(block)
    if digest.hexdigest() != MD5[source.name]:
        raise ValueError(
            f"{source} is not the published file (MD5 {digest.hexdigest()} instead of {MD5[source.name]}): "
            "fetch it again; or, to use it as it is, unpack it and give the folder"
        )


def unpack(
    source: Path,
    wanted: dict[str, str],
    out: Path,
    *,
    expected: str,
    convert: Callable[[bytes], bytes] | None = None,
    ending: str | None = None,
    skip: set[str] | None = None,
) -> list[str]:
    """Put files of an archive or folder where they belong; those that are there already stay.

    Args:
        source: The archive or folder.
        wanted: Patterns of the last parts of a file's path, and the folder in ``out`` that such files go to.
        out: The folder to fill.
        expected: What ``source`` should be; for the message if it holds nothing of the kind.
        convert: Makes another content of what was read.
        ending: Replaces the ending of the file's name.
        skip: Names, without ending, of files to leave alone.

    Returns:
        The paths in ``source`` of all files that are wanted, skipped or not.
    """
    patterns = [(re.compile(rf"(?:^|/)({pattern})$"), out / folder) for pattern, folder in wanted.items()]
    taken: dict[Path, str] = {}
    bad: list[str] = []
    with reading(source):
        for member in members(source):
            folder = next((folder for pattern, folder in patterns if pattern.search(member.name)), None)
            if folder is None:
                continue
            target = folder / Path(member.name).name
            target = target if ending is None else target.with_suffix(ending)
            if target in taken:
                raise ValueError(
                    f"{source} holds both {taken[target]} and {member.name}: give {expected}, and that alone"
                )
            taken[target] = member.name
            if target.stem not in (skip or ()) and (reason := _place(member, target, out, convert)):
                bad.append(f"{member.name} cannot be used: {reason}")
    if bad:
        others = f" (and {len(bad) - 1} more of {len(taken)} files)" if len(bad) > 1 else ""
        raise ValueError(
            f"{source}: {bad[0]}{others}: fetch it again and repeat the command; the {len(taken) - len(bad)} "
            "others are in place"
        )
    if not taken:
        looked_for = " or ".join(wanted).replace("[^/.]+", "*").replace("\\.", ".")
        raise ValueError(f"{source} holds no {looked_for}: give {expected}")
    return list(taken.values())


def _place(member: Member, target: Path, out: Path, convert: Callable[[bytes], bytes] | None) -> str | None:
    """Write one file, unless it is there. Says why, if its content cannot be used."""
    if target.is_file() and (convert is not None or target.stat().st_size == member.size):
        return None
    if convert is None and member.path is not None:
        with writing(out):
            replace_file(target, partial(_link, member.path))
        return None
    content = member.read()
    if convert is not None:
        try:
            content = convert(content)
        except ValueError as error:
            return str(error)
    with writing(out):
        replace_file(target, partial(_write, content))
    return None


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, target)


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def members(source: Path) -> Iterator[Member]:
    """The files of an archive, in its order, or of a folder; shows how far it is.

    A folder's own name is part of the paths, as it would be in an archive of it.
    """
    text = f"unpacking {source.name}"
    if source.is_dir():
        files = list(_files(source.resolve()))
        yield from track(files, text, len(files), "files")
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            for entry in track(entries, text, len(entries), "files"):
                yield Member(entry.filename, entry.file_size, partial(archive.read, entry), None)
    elif source.suffix == ".json":
        yield Member(source.name, source.stat().st_size, source.read_bytes, source)
    else:
        progress = Progress(text, source.stat().st_size // MEGABYTE, "MB", transient=True)
        with source.open("rb") as file, tarfile.open(fileobj=file) as tar, progress:
            for info in tar:
                if info.isfile():  # neither folders nor links
                    yield Member(info.name, info.size, partial(_extract, tar, info), None)
                progress.advance(file.tell() // MEGABYTE - progress.done)


def _files(folder: Path) -> Iterator[Member]:
    def refuse(error: OSError) -> None:
        raise error

    for base, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            path = Path(base, name)
            inner = path.relative_to(folder.parent).as_posix()
            yield Member(inner, path.stat().st_size, path.read_bytes, path)


def _extract(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    assert file is not None  # only links and folders have none
    return file.read()


@contextmanager
def reading(source: Path) -> Iterator[None]:
    """Say what to do about an archive that cannot be read."""
    again = "fetch it again and repeat the command; what is unpacked stays"
    try:
        yield
    except PermissionError as error:
        raise ValueError(
            f"{error.filename or source} may not be read (permission denied): allow it with `chmod u+r`"
        ) from None
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if source.is_file() and not source.stat().st_size:
            raise ValueError(f"{source} is empty, 0 bytes: fetch it again") from None
        reason = str(error) or type(error).__name__
        if "could not be opened" in reason:  # tarfile then tells how it tried each compression
            reason = "neither tar nor zip"
        raise ValueError(f"{source} is cut short, damaged or no archive ({reason}): {again}") from None


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Say what to do about a folder that cannot be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{out} cannot be written ({error.strerror or error}): make room or name another folder, and "
            "repeat the command; what is there stays"
        ) from None
