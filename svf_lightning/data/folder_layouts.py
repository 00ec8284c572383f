"""Find out what a user's folder holds: pictures, masks, class names, and what does not fit together.

Nothing here opens a picture, and nothing that is wrong with one file hides another.
"""

import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from svf_lightning.episode import IGNORE

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
MASK_ENDINGS = ("", "_mask", "-mask")  # x.jpg may have x.png, x_mask.png or x-mask.png
COCO_KEYS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name"),
    "annotations": ("image_id", "category_id"),
}
BACKGROUND_NAMES = ("background", "_background_", "__background__", "bg")


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


def list_folder(root: str | Path, layout: str = "auto") -> Listing:
    """Find pictures, masks and class names under ``root``; opens no picture.

    Whatever is wrong with single files is in the result's ``problems``.

    Raises:
        FileNotFoundError: If there is no such folder, no layout fits, or no picture is in it.
        ValueError: If ``layout`` is unknown, or ``classes.txt`` or the annotations cannot be read.
    """
    root = Path(root)
    if layout != "auto" and layout not in get_args(Layout):
        raise ValueError(f"layout is {layout!r}; use auto, {', '.join(get_args(Layout))}")
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise FileNotFoundError(f"{root} {what}: name the folder that holds your images")
    chosen = layout if layout != "auto" else _detect(root)
    listing = {"folders": _list_folders, "indexed": _list_indexed, "coco": _list_coco}[chosen](root)
    if not listing.items and not listing.problems:
        raise FileNotFoundError(f"{root} holds no images in the layout {chosen!r}: put some into it")
    return replace(listing, problems=tuple(p._replace(file=_below(p.file, root)) for p in listing.problems))


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
            if not _is_hidden(name) and os.path.realpath(os.path.join(place, name)) not in seen
        )
        for name in sorted(names):
            path = Path(place, name)
            if _is_hidden(name):
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
            found = f"{first[name].name} has the same name, so that one mask would stand for both"
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


def _detect(root: Path) -> Layout:
    images, masks = _subfolder(root, "images"), _subfolder(root, "masks")
    if images and masks and _find(root, "classes.txt"):
        return "indexed"
    if images and masks and any(path.is_dir() and not _is_hidden(path.name) for path in images.iterdir()):
        return "folders"
    if any(_looks_like_coco(path) for path in _annotation_files(root)):
        return "coco"
    inside = sorted(path.name for path in root.iterdir() if not _is_hidden(path.name))
    if images and masks:
        hint = "images/ and masks/ are there, but no folder per class in them, and no classes.txt"
    elif root.name.casefold() in ("images", "masks") and _subfolder(root.parent, "images"):
        hint = f"the data begins one folder up: use {root.parent}"
    elif deeper := [path for path in root.iterdir() if path.is_dir() and _subfolder(path, "images")]:
        hint = f"the data lies deeper: use {deeper[0]}"
    else:
        hint = f"it holds {', '.join(inside[:6]) or 'nothing'}{' and more' if len(inside) > 6 else ''}"
    raise FileNotFoundError(f"{root} has none of the layouts {LAYOUTS}. Here {hint}")


def _list_folders(root: Path) -> Listing:
    images, masks = _wanted(root, "images"), _wanted(root, "masks")
    problems: list[Problem] = []
    image_folders, mask_folders = (_class_folders(folder, problems) for folder in (images, masks))
    names = tuple(sorted((name_of(path.name) for path in image_folders.values()), key=same_name))
    items: list[Item] = []
    for class_id, name in enumerate(names, start=1):
        folder = image_folders[same_name(name)]
        files, odd = image_files(folder)
        problems += odd
        if not files:
            problems.append(Problem(str(folder), "holds no images", "put some into it, or delete it"))
        mask_folder = mask_folders.get(same_name(name))
        if mask_folder is None:
            if files:
                found = f"is missing, so that {len(files)} images have no mask"
                problems.append(Problem(str(masks / folder.name), found, "put their masks into it"))
            continue
        mask_files, odd = image_files(mask_folder)
        problems += odd
        pairs, unpaired = pair_masks(files, folder, mask_files, mask_folder)
        problems += unpaired
        items += [
            Item(f"{name}/{_id(image, folder)}", image, mask, class_id=class_id) for image, mask in pairs
        ]
    for key, folder in mask_folders.items():
        if key not in image_folders:
            remedy = f"add {images / folder.name}, or delete it"
            problems.append(Problem(str(folder), "is a class without a folder of images", remedy, "warning"))
    return Listing("folders", names, tuple(items), tuple(problems))


def _list_indexed(root: Path) -> Listing:
    images, masks = _wanted(root, "images"), _wanted(root, "masks")
    names_file = _find(root, "classes.txt")
    if names_file is None:
        raise FileNotFoundError(f"{root} has no classes.txt: write the name of class n into line n of it")
    files, problems = image_files(images)
    mask_files, odd = image_files(masks)
    pairs, unpaired = pair_masks(files, images, mask_files, masks)
    items = tuple(Item(_id(image, images), image, mask) for image, mask in pairs)
    return Listing(
        "indexed", read_names(names_file), items, (*problems, *odd, *unpaired), sources=(names_file,)
    )


def read_names(path: Path) -> tuple[str, ...]:
    """Class names from ``classes.txt``: line n names class n.

    A first line "background" is skipped. If every line begins with a number, the numbers count instead.

    Raises:
        ValueError: If names are missing or repeated, or it is not text.
    """
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    numbered = [match for line in lines if (match := re.fullmatch(r"(\d+)\s*[:;,.)\s]\s*(\S.*)", line))]
    if lines and len(numbered) == len(lines):
        named = sorted((int(match[1]), match[2]) for match in numbered)
        if named[0][0] == 0 and named[0][1].casefold() in BACKGROUND_NAMES:
            named = named[1:]
        if [number for number, _ in named] != list(range(1, len(named) + 1)):
            found = ", ".join(str(number) for number, _ in named[:8])
            raise ValueError(
                f"{path} numbers its classes {found}: number them 1, 2, 3 and so on (0 is background), or "
                "leave the numbers away"
            )
        lines = [name for _, name in named]
    elif lines and lines[0].casefold() in BACKGROUND_NAMES:
        lines = lines[1:]
    if not lines:
        raise ValueError(f"{path} names no class: write one name per line")
    if len(lines) > 254:
        raise ValueError(
            f"{path} names {len(lines)} classes, but ids end at 254 (255 is ignored): merge some"
        )
    name, count = Counter(same_name(line) for line in lines).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{path} names {name!r} {count} times: give each class a name of its own")
    return tuple(name_of(line) for line in lines)


def _list_coco(root: Path) -> Listing:
    candidates = [path for path in _annotation_files(root) if _looks_like_coco(path)] or _annotation_files(
        root
    )
    if not candidates:
        raise FileNotFoundError(f"{root} has no annotations.json: export your annotations in COCO's format")
    path = next((c for c in candidates if c.name.casefold() == "annotations.json"), candidates[0])
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no sound JSON ({error}): export it again") from None
    tables = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(table), list) for table in tables):
        raise ValueError(
            f"{path} is not in COCO's format: it lacks a list of images, annotations or categories; export "
            "the instances (objects), not captions or key points"
        )
    problems: list[Problem] = []
    if len(candidates) > 1:
        others = ", ".join(c.name for c in candidates if c != path)
        problems.append(
            Problem(str(path), f"is read, {others} not", "name the file annotations.json", "warning")
        )
    return _list_coco_images(root, path, content, problems)


def _list_coco_images(root: Path, path: Path, content: dict[str, Any], problems: list[Problem]) -> Listing:
    def complain(found: str, remedy: str, severity: Literal["error", "warning"] = "error") -> None:
        problems.append(Problem(str(path), found, remedy, severity))

    for table, keys in COCO_KEYS.items():
        for entry in content[table]:
            if wrong := _wrong_entry(entry, keys):
                raise ValueError(
                    f"{path} has an entry of {table} {wrong}: export it again, complete, and the instances "
                    "(objects), not captions or key points"
                )
    categories = {entry["id"]: entry["name"] for entry in content["categories"]}
    records = {record["id"]: record for record in content["images"]}
    annotations = [(entry["image_id"], entry["category_id"], entry) for entry in content["annotations"]]
    names_of = {number: record["file_name"] for number, record in records.items()}
    if len(records) < len(content["images"]):
        complain(
            f"gives {len(content['images']) - len(records)} images an id that another has", "renumber them"
        )
    # A category that no annotation uses is not a class: exporters like to add a root category.
    used = sorted(
        set(categories) & {category for _, category, _ in annotations},
        key=lambda category: (isinstance(category, str), category),
    )
    classes = {category: number for number, category in enumerate(used, start=1)}
    names = tuple(name_of(categories[category]) for category in used)
    if not names:
        raise ValueError(f"{path} annotates nothing: outline some objects, and export it again")
    if len(names) >= IGNORE:
        raise ValueError(
            f"{path} has objects of {len(names)} categories, but ids end at 254 (255 is ignored): merge some"
        )
    if len({same_name(name) for name in names}) < len(names):
        raise ValueError(f"{path} has several categories of one name among {', '.join(names)}: merge them")

    found: dict[Any, list[tuple[float, int, Any]]] = {number: [] for number in records}
    for image_id, category, entry in annotations:
        label = f"annotation {entry.get('id', '?')}"
        if image_id not in records:
            complain(f"{label} is of image {image_id}, which it does not list", "export it again")
        elif category not in classes:
            complain(f"{label} is of category {category}, which it does not list", "export it again")
        elif wrong := _wrong_segmentation(entry.get("segmentation"), records[image_id]):
            complain(f"{label} of {names_of[image_id]} {wrong}", "outline the object, or delete it")
        else:
            crowd = bool(entry.get("iscrowd"))
            area = entry.get("area")
            behind = float("-inf") if crowd else -area if isinstance(area, (int, float)) else 0.0
            found[image_id].append((behind, IGNORE if crowd else classes[category], entry["segmentation"]))

    folder = _subfolder(root, "images")
    places = [place for place in (folder, path.parent, root) if place is not None]
    items: list[Item] = []
    listed: set[str] = set()
    for number, record in records.items():
        name = names_of[number]
        file = next((place / name for place in places if _is_file(place / name)), None)
        if file is None and folder is not None:  # exporters differ in how much of the path they keep
            file = next((f for f in (folder / Path(name).name,) if _is_file(f)), None)
        sides = record.get("width"), record.get("height")
        if not all(side is None or type(side) is int for side in sides):
            complain(
                f"gives {name} the width {sides[0]!r} and the height {sides[1]!r}", "write whole numbers"
            )
        elif file is None:
            complain(f"lists {name}, which is not in {places[0]}", "put it there, or export without it")
        elif str(file) in listed:
            complain(f"lists {name} twice", "delete one of the entries")
        else:
            listed.add(str(file))
            objects = tuple((c, s) for _, c, s in sorted(found[number], key=lambda entry: entry[0]))
            size = (sides[0], sides[1]) if sides[0] and sides[1] else None
            items.append(Item(Path(name).with_suffix("").as_posix(), file, objects=objects, size=size))
    if folder is not None:
        files, odd = image_files(folder)
        problems += odd
        problems += [
            Problem(
                str(file), f"is not listed in {path.name}", "annotate it, or move it elsewhere", "warning"
            )
            for file in files
            if str(file) not in listed
        ]
    return Listing("coco", names, tuple(items), tuple(problems), sources=(path,))


def _wrong_segmentation(segmentation: Any, record: dict[str, Any]) -> str | None:
    """What keeps a segmentation from being drawn, if anything."""
    if not segmentation:
        return "has no outline (a box alone does not say which pixels)"
    if isinstance(segmentation, list):
        if not all(isinstance(polygon, list) and len(polygon) >= 6 for polygon in segmentation):
            return "has a polygon of fewer than three points"
        if not all(len(polygon) % 2 == 0 for polygon in segmentation):
            return "has a polygon with an odd number of coordinates"
        numbers = (number for polygon in segmentation for number in polygon)
        return None if all(_is_number(number) for number in numbers) else "has a polygon of other things"
    counts, size = (
        (segmentation.get("counts"), segmentation.get("size"))
        if isinstance(segmentation, dict)
        else (None,) * 2
    )
    if not isinstance(counts, (str, list)) or not isinstance(size, list) or len(size) != 2:
        return "has neither polygons nor run lengths"
    sides = [record.get("height"), record.get("width")]
    if all(sides) and size != sides:
        return f"has run lengths for {size}, but its image is {sides} (height, width)"
    if isinstance(counts, list) and not all(type(count) is int and count >= 0 for count in counts):
        return "has run lengths that are no counts"
    if isinstance(counts, list) and all(map(_is_number, size)) and sum(counts) != size[0] * size[1]:
        return f"has run lengths for {sum(counts)} pixels, but its image has {size[0] * size[1]}"
    return None


def _wrong_entry(entry: Any, keys: Sequence[str]) -> str | None:
    """What keeps an entry of a table of COCO's from being used, if anything."""
    if not isinstance(entry, dict):
        return f"that is {json.dumps(entry)[:40]}"
    for key in keys:
        if key not in entry:
            return f"without {key!r}"
        kinds = (int, str) if key.endswith("id") else (str,)
        if not isinstance(entry[key], kinds) or entry[key] == "":
            return f"with {key} {json.dumps(entry[key])[:40]}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or one that no file can have
        return False


def _annotation_files(root: Path) -> list[Path]:
    return sorted(
        path for place in (root, root / "annotations", root / "images") for path in place.glob("*.json")
    )


def _looks_like_coco(path: Path) -> bool:
    """Whether a JSON file is one of COCO's; a broken one called annotations.json was meant to be."""
    if path.name.casefold() in ("annotations.json", "_annotations.coco.json"):
        return True
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def _class_folders(folder: Path, problems: list[Problem]) -> dict[str, Path]:
    """The folders in one, by name; two names that only the case or accents tell apart are a problem."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if _is_hidden(path.name):
            continue
        if not path.is_dir():
            if path.suffix.lower() in IMAGE_ENDINGS:
                problems.append(
                    Problem(str(path), "lies in no class folder", f"move it to {folder}/<class>/")
                )
        elif same_name(path.name) in found:
            other = found[same_name(path.name)].name
            problems.append(Problem(str(path), f"is the same class as {other}", "put both into one folder"))
        else:
            found[same_name(path.name)] = path
    return found


def _wanted(root: Path, name: str) -> Path:
    folder = _subfolder(root, name)
    if folder is None:
        raise FileNotFoundError(f"{root} has no folder {name}/: the layouts are {LAYOUTS}")
    return folder


def _subfolder(root: Path, name: str) -> Path | None:
    return next(
        (path for path in sorted(root.iterdir()) if path.name.casefold() == name and path.is_dir()), None
    )


def _find(root: Path, name: str) -> Path | None:
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


def _id(image: Path, folder: Path) -> str:
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


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "~$")) or name.casefold() in IGNORED_NAMES


def _below(path: str, root: Path) -> str:
    """A path relative to ``root``, where it lies there."""
    try:
        return Path(path).relative_to(root).as_posix()
    except ValueError:
        return path
