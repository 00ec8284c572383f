"""The files in a user's folder, by their names: pictures, masks, texts, and what does not fit together.

Nothing here opens a picture, and nothing that is wrong with one file hides another.
"""

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from svf_lightning.errors import DataError, Problem, printable

Layout = Literal["folders", "indexed", "coco"]

IMAGE_ENDINGS = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".bmp", ".dib", ".gif", ".webp", ".avif"),
        *(".tif", ".tiff", ".pgm", ".ppm", ".pnm", ".tga"),
    )
)

UNREAD_ENDINGS = frozenset(  # pictures to their owner, but not to Pillow
    (".heic", ".heif", ".raw", ".dng", ".cr2", ".nef", ".arw", ".psd", ".svg", ".pdf", ".dcm", ".npy", ".nii")
)

IGNORED_NAMES = frozenset(("thumbs.db", "desktop.ini", "__macosx", "@eadir"))

MASK_ENDINGS = ("", "_mask", "-mask")  # x.jpg may have x.png, x_mask.png or x-mask.png


@dataclass(frozen=True)
class Item:
    """One picture, and where its label is."""

    id: str
    image: Path
    mask: Path | None = None
    class_id: int = 0  # of the one class that the mask shows; 0 where the mask holds ids
    objects: tuple[tuple[int, Any], ...] = ()  # class id and COCO segmentation, those behind first
    size: tuple[int, int] | None = None  # width and height that the annotations say


@dataclass(frozen=True)
class Listing:
    """What lies in a folder. No picture has been opened yet."""

    layout: Layout
    class_names: tuple[str, ...]
    items: tuple[Item, ...]
    problems: tuple[Problem, ...]
    sources: tuple[Path, ...] = ()  # files besides the pictures and masks that all this follows from


def image_files(folder: Path) -> tuple[list[Path], list[Problem]]:
    """All pictures in a folder and the folders in it, by name, and what else lies there.

    Hidden files, and the litter that systems leave behind, are passed over.
    """
    files: list[Path] = []
    problems: list[Problem] = []

    def refuse(error: OSError) -> None:
        problems.append(Problem(str(error.filename), "cannot be listed", f"allow it ({error.strerror})"))

    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = sorted(
            name
            for name in folders
            if not is_hidden(name) and os.path.realpath(os.path.join(place, name)) not in seen
        )
        for name in sorted(names):
            path = Path(place, name)
            if is_hidden(name):
                continue
            if path.exists() and not path.is_file():
                problems.append(Problem(str(path), "is a pipe, socket or device", "delete it"))
            elif path.suffix.lower() in IMAGE_ENDINGS:
                files.append(path)
            else:
                known = path.suffix.lower() in UNREAD_ENDINGS
                remedy = "convert it to PNG or JPEG" if known else "it is passed over; move it elsewhere"
                severity: Literal["error", "warning"] = "error" if known else "warning"
                kind = f"{path.suffix} files are not read" if path.suffix else "no image by its name"
                problems.append(Problem(str(path), kind, remedy, severity))
    return files, problems


def pair_masks(
    images: Sequence[Path], image_root: Path, masks: Sequence[Path], mask_root: Path
) -> tuple[list[tuple[Path, Path]], list[Problem]]:
    """Bring every image together with the mask of its name.

    Names are compared as seen: without their ending, whatever the case, and however their accents are
    stored (macOS takes them apart).

    Returns:
        The pairs, and the files without a partner or with too many.
    """
    by_name: dict[str, list[Path]] = {}
    for mask in masks:
        by_name.setdefault(same_name(mask.relative_to(mask_root).with_suffix("").as_posix()), []).append(mask)
    pairs, problems = [], []
    first: dict[str, Path] = {}
    used: set[Path] = set()
    for image in images:
        relative = image.relative_to(image_root)
        name = same_name(relative.with_suffix("").as_posix())
        if name in first:
            found = f"is ambiguous, as {first[name].name} has the same name and one mask would stand for both"
            problems.append(Problem(str(image), found, "rename one of them, and its mask"))
            continue
        first[name] = image
        candidates = [name + ending for ending in MASK_ENDINGS] + [same_name(relative.as_posix())]
        matching = next((by_name[candidate] for candidate in candidates if candidate in by_name), [])
        used.update(matching)
        if len(matching) == 1:
            pairs.append((image, matching[0]))
        elif matching:
            names = ", ".join(mask.name for mask in matching)
            problems.append(Problem(str(image), f"has {len(matching)} masks: {names}", "keep one of them"))
        else:
            wanted = mask_root / relative.with_suffix(".png")
            problems.append(Problem(str(image), "has no mask", f"draw {wanted}, or move the image elsewhere"))
    for mask in masks:
        if mask not in used:
            remedy = f"add its image to {image_root}, or delete it"
            problems.append(Problem(str(mask), "is a mask without an image", remedy, "warning"))
    return pairs, problems


def subfolder(root: Path, name: str) -> Path | None:
    return next(
        (path for path in sorted(root.iterdir()) if path.name.casefold() == name and path.is_dir()), None
    )


def find(root: Path, name: str) -> Path | None:
    return next((path for path in sorted(root.iterdir()) if path.name.casefold() == name), None)


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or one that no file can have
        return False


def read_text(path: Path) -> str:
    """A text file; the mark that Windows puts at the beginning of one is taken off.

    Raises:
        DataError: If it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError.of(path, "is not UTF-8 text", "save it as UTF-8") from None
    except PermissionError:
        found = "may not be read (permission denied)"
        raise DataError.of(path, found, "allow it with `chmod u+r`") from None
    except OSError as error:
        raise DataError.of(path, f"cannot be read ({error.strerror})", "put a text file there") from None


def id_of(image: Path, folder: Path) -> str:
    return name_of(image.relative_to(folder).with_suffix("").as_posix())


def same_name(name: str) -> str:
    """A text that is equal for names that look alike, whatever the case and the encoding of accents."""
    return name_of(name).casefold()


def name_of(text: str) -> str:
    """A name from a file name or a text, with its accents in one piece, as it can be printed and stored."""
    return printable(unicodedata.normalize("NFC", text))


def is_hidden(name: str) -> bool:
    return name.startswith((".", "~$")) or name.casefold() in IGNORED_NAMES


def below(path: str, root: Path) -> str:
    """A path relative to ``root``, where it lies in there."""
    try:
        relative = Path(path).relative_to(root)
    except ValueError:
        return path
    return relative.as_posix() if relative.parts else path
