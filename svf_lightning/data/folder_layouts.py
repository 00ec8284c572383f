"""Find out what a user's folder holds: pictures, masks, class names, and what does not fit together.

Nothing here opens a picture, and nothing that is wrong with one file hides another.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from svf_lightning.data.coco_layout import annotation_files, list_coco, looks_like_coco
from svf_lightning.data.listing import (
    IMAGE_ENDINGS,
    LAYOUTS,
    Item,
    Layout,
    Listing,
    Problem,
    find_entry,
    image_files,
    image_id,
    is_hidden,
    name_of,
    read_text,
    same_name,
    subfolder,
    wanted_folder,
)

MASK_ENDINGS = ("", "_mask", "-mask")  # x.jpg may have x.png, x_mask.png or x-mask.png


BACKGROUND_NAMES = ("background", "_background_", "__background__", "bg")


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
    listing = {"folders": _list_folders, "indexed": _list_indexed, "coco": list_coco}[chosen](root)
    if not listing.items and not listing.problems:
        raise FileNotFoundError(f"{root} holds no images in the layout {chosen!r}: put some into it")
    return replace(listing, problems=tuple(p._replace(file=_below(p.file, root)) for p in listing.problems))


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
    images, masks = subfolder(root, "images"), subfolder(root, "masks")
    if images and masks and find_entry(root, "classes.txt"):
        return "indexed"
    if images and masks and any(path.is_dir() and not is_hidden(path.name) for path in images.iterdir()):
        return "folders"
    if any(looks_like_coco(path) for path in annotation_files(root)):
        return "coco"
    inside = sorted(path.name for path in root.iterdir() if not is_hidden(path.name))
    if images and masks:
        hint = "images/ and masks/ are there, but no folder per class in them, and no classes.txt"
    elif root.name.casefold() in ("images", "masks") and subfolder(root.parent, "images"):
        hint = f"the data begins one folder up: use {root.parent}"
    elif deeper := [path for path in root.iterdir() if path.is_dir() and subfolder(path, "images")]:
        hint = f"the data lies deeper: use {deeper[0]}"
    else:
        hint = f"it holds {', '.join(inside[:6]) or 'nothing'}{' and more' if len(inside) > 6 else ''}"
    raise FileNotFoundError(f"{root} has none of the layouts {LAYOUTS}. Here {hint}")


def _list_folders(root: Path) -> Listing:
    images, masks = wanted_folder(root, "images"), wanted_folder(root, "masks")
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
            Item(f"{name}/{image_id(image, folder)}", image, mask, class_id=class_id) for image, mask in pairs
        ]
    for key, folder in mask_folders.items():
        if key not in image_folders:
            remedy = f"add {images / folder.name}, or delete it"
            problems.append(Problem(str(folder), "is a class without a folder of images", remedy, "warning"))
    return Listing("folders", names, tuple(items), tuple(problems))


def _list_indexed(root: Path) -> Listing:
    images, masks = wanted_folder(root, "images"), wanted_folder(root, "masks")
    names_file = find_entry(root, "classes.txt")
    if names_file is None:
        raise FileNotFoundError(f"{root} has no classes.txt: write the name of class n into line n of it")
    files, problems = image_files(images)
    mask_files, odd = image_files(masks)
    pairs, unpaired = pair_masks(files, images, mask_files, masks)
    items = tuple(Item(image_id(image, images), image, mask) for image, mask in pairs)
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


def _class_folders(folder: Path, problems: list[Problem]) -> dict[str, Path]:
    """The folders in one, by name; two names that only the case or accents tell apart are a problem."""
    found: dict[str, Path] = {}
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
    return found


def _below(path: str, root: Path) -> str:
    """A path relative to ``root``, where it lies there."""
    try:
        return Path(path).relative_to(root).as_posix()
    except ValueError:
        return path
