"""What a listing of a user's folder is made of: pictures, names, and problems with them. Opens no picture."""

import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

Layout = Literal["folders", "indexed", "coco"]


LAYOUTS = (
    "(1) images/<class>/x.jpg with masks/<class>/x.png; "
    "(2) images/x.jpg with masks/x.png of class ids, and classes.txt; "
    "(3) annotations.json in COCO's format, with images/"
)


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


class Problem(NamedTuple):
    """Something wrong with one file, or worth knowing; an error keeps that file from being used."""

    file: str
    found: str
    remedy: str
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return printable(f"{self.file}: {self.found}; {self.remedy}")


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


def wanted_folder(root: Path, name: str) -> Path:
    folder = subfolder(root, name)
    if folder is None:
        raise FileNotFoundError(f"{root} has no folder {name}/: the layouts are {LAYOUTS}")
    return folder


def subfolder(root: Path, name: str) -> Path | None:
    return next(
        (path for path in sorted(root.iterdir()) if path.name.casefold() == name and path.is_dir()), None
    )


def find_entry(root: Path, name: str) -> Path | None:
    return next((path for path in sorted(root.iterdir()) if path.name.casefold() == name), None)


def read_text(path: Path) -> str:
    """A text file; the mark that Windows puts at the beginning of one is taken off."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    except PermissionError:
        raise ValueError(f"{path} may not be read (permission denied): allow it with `chmod u+r`") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): put a text file there") from None


def image_id(image: Path, folder: Path) -> str:
    return name_of(image.relative_to(folder).with_suffix("").as_posix())


def same_name(name: str) -> str:
    """A text that is equal for names that look alike, whatever the case and the encoding of accents."""
    return name_of(name).casefold()


def name_of(text: str) -> str:
    """A name from a file name or a text, with its accents in one piece, as it can be printed and stored."""
    return printable(unicodedata.normalize("NFC", text))


def printable(text: str) -> str:
    r"""A text with bytes that are no UTF-8 spelled out, as old archives leave them in file names.

    Python keeps such bytes as lone surrogates, which neither a terminal nor a file takes.

    Example:
        >>> print(printable(b"caf\xe9.jpg".decode("utf-8", "surrogateescape")))
        caf\udce9.jpg
    """
    return text.encode("utf-8", "backslashreplace").decode()


def is_hidden(name: str) -> bool:
    return name.startswith((".", "~$")) or name.casefold() in IGNORED_NAMES
