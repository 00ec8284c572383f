"""Finding out what a user's folder holds, in one of three layouts. No picture is opened."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from svf_lightning.data.coco_layout import annotation_files, list_coco, looks_like_coco
from svf_lightning.data.folder_files import (
    IMAGE_ENDINGS,
    Item,
    Layout,
    Listing,
    below,
    find,
    id_of,
    image_files,
    is_hidden,
    name_of,
    pair_masks,
    read_text,
    same_name,
    subfolder,
)
from svf_lightning.errors import DataError, MissingFileError, Problem

LAYOUTS: dict[Layout, str] = {
    "folders": "images/<class>/x.jpg with masks/<class>/x.png",
    "indexed": "images/x.jpg with masks/x.png of class ids, and classes.txt",
    "coco": "annotations.json in COCO's format, with images/",
}
_CHOICE = "; ".join(f"({number}) {what}" for number, what in enumerate(LAYOUTS.values(), start=1))
BACKGROUND_NAMES = ("background", "_background_", "__background__", "bg")


def list_folder(root: str | Path, layout: str = "auto") -> Listing:
    """Find pictures, masks and class names under ``root``; opens no picture.

    Whatever is wrong with single files is in the result's ``problems``.

    Raises:
        MissingFileError: If there is no such folder, no layout fits, or no picture is in it.
        DataError: If ``classes.txt`` or the annotations cannot be read.
        ValueError: If ``layout`` is unknown.
    """
    root = Path(root)
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"layout is {layout!r}; use auto, {', '.join(LAYOUTS)}")
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise MissingFileError.of(root, what, "name the folder that holds your images")
    chosen = layout if layout != "auto" else _detect(root)
    listing = {"folders": _list_folders, "indexed": _list_indexed, "coco": list_coco}[chosen](root)
    if not listing.items and not listing.problems:
        raise MissingFileError.of(root, f"holds no images in the layout {chosen!r}", "put some into it")
    return replace(listing, problems=tuple(p._replace(file=below(p.file, root)) for p in listing.problems))


def _detect(root: Path) -> Layout:
    images, masks = subfolder(root, "images"), subfolder(root, "masks")
    if images and masks and find(root, "classes.txt"):
        return "indexed"
    if images and masks and any(path.is_dir() and not is_hidden(path.name) for path in images.iterdir()):
        return "folders"
    if any(looks_like_coco(path) for path in annotation_files(root)):
        return "coco"
    remedy = "arrange it so, and check again"
    inside = sorted(path.name for path in root.iterdir() if not is_hidden(path.name))
    if images and masks:
        here = "images/ and masks/ are there, but no folder per class in them, and no classes.txt"
    elif root.name.casefold() in ("images", "masks") and subfolder(root.parent, "images"):
        here, remedy = "the data begins one folder up", f"use {root.parent}"
    elif deeper := [path for path in root.iterdir() if path.is_dir() and subfolder(path, "images")]:
        here, remedy = "the data lies deeper", f"use {deeper[0]}"
    else:
        here = f"it holds {', '.join(inside[:6]) or 'nothing'}{' and more' if len(inside) > 6 else ''}"
    raise MissingFileError.of(root, f"has none of the layouts {_CHOICE}. Here {here}", remedy)


def _list_folders(root: Path) -> Listing:
    images, masks = _wanted(root, "images"), _wanted(root, "masks")
    image_folders, problems = _class_folders(images)
    mask_folders, odd = _class_folders(masks)
    problems += odd
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
            Item(f"{name}/{id_of(image, folder)}", image, mask, class_id=class_id) for image, mask in pairs
        ]
    for key, folder in mask_folders.items():
        if key not in image_folders:
            remedy = f"add {images / folder.name}, or delete it"
            problems.append(Problem(str(folder), "is a class without a folder of images", remedy, "warning"))
    return Listing("folders", names, tuple(items), tuple(problems))


def _list_indexed(root: Path) -> Listing:
    images, masks = _wanted(root, "images"), _wanted(root, "masks")
    names_file = find(root, "classes.txt")
    if names_file is None:
        raise MissingFileError.of(root, "has no classes.txt", "write the name of class n into line n of it")
    files, problems = image_files(images)
    mask_files, odd = image_files(masks)
    pairs, unpaired = pair_masks(files, images, mask_files, masks)
    items = tuple(Item(id_of(image, images), image, mask) for image, mask in pairs)
    return Listing(
        "indexed", read_names(names_file), items, (*problems, *odd, *unpaired), sources=(names_file,)
    )


def read_names(path: Path) -> tuple[str, ...]:
    """Class names from ``classes.txt``: line n names class n.

    A first line "background" is skipped. If every line begins with a number, the numbers count instead.

    Raises:
        DataError: If names are missing or repeated, or it is not text.
    """
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    numbered = [match for line in lines if (match := re.fullmatch(r"(\d+)\s*[:;,.)\s]\s*(\S.*)", line))]
    if lines and len(numbered) == len(lines):
        named = sorted((int(match[1]), match[2]) for match in numbered)
        if named[0][0] == 0 and named[0][1].casefold() in BACKGROUND_NAMES:
            named = named[1:]
        if [number for number, _ in named] != list(range(1, len(named) + 1)):
            found = ", ".join(str(number) for number, _ in named[:8])
            remedy = "number them 1, 2, 3 and so on (0 is background), or leave the numbers away"
            raise DataError.of(path, f"numbers its classes {found}", remedy)
        lines = [name for _, name in named]
    elif lines and lines[0].casefold() in BACKGROUND_NAMES:
        lines = lines[1:]
    if not lines:
        raise DataError.of(path, "names no class", "write one name per line")
    if len(lines) > 254:
        found = f"names {len(lines)} classes, but ids end at 254 (255 is ignored)"
        raise DataError.of(path, found, "merge some")
    name, count = Counter(same_name(line) for line in lines).most_common(1)[0]
    if count > 1:
        raise DataError.of(path, f"names {name!r} {count} times", "give each class a name of its own")
    return tuple(name_of(line) for line in lines)


def _class_folders(folder: Path) -> tuple[dict[str, Path], list[Problem]]:
    """The folders in one, by name; two names that only the case or accents tell apart are a problem."""
    found: dict[str, Path] = {}
    problems: list[Problem] = []
    for path in sorted(folder.iterdir()):
        if is_hidden(path.name):
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
    return found, problems


def _wanted(root: Path, name: str) -> Path:
    folder = subfolder(root, name)
    if folder is None:
        raise MissingFileError.of(root, f"has no folder {name}/", f"the layouts are {_CHOICE}")
    return folder
