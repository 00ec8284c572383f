"""A user's folder with annotations in COCO's format: which objects each picture shows."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from svf_lightning.data.folder_files import (
    Item,
    Listing,
    image_files,
    is_file,
    name_of,
    read_text,
    same_name,
    subfolder,
)
from svf_lightning.episode import IGNORE
from svf_lightning.errors import DataError, MissingFileError, Problem

COCO_KEYS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name"),
    "annotations": ("image_id", "category_id"),
}


def annotation_files(root: Path) -> list[Path]:
    return sorted(
        path for place in (root, root / "annotations", root / "images") for path in place.glob("*.json")
    )


def looks_like_coco(path: Path) -> bool:
    """Whether a JSON file is one of COCO's; a broken one called annotations.json was meant to be."""
    if path.name.casefold() in ("annotations.json", "_annotations.coco.json"):
        return True
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def list_coco(root: Path) -> Listing:
    candidates = [path for path in annotation_files(root) if looks_like_coco(path)] or annotation_files(root)
    if not candidates:
        raise MissingFileError.of(root, "has no annotations.json", "export your annotations in COCO's format")
    path = next((c for c in candidates if c.name.casefold() == "annotations.json"), candidates[0])
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError.of(path, f"is no sound JSON ({error})", "export it again") from None
    tables = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(table), list) for table in tables):
        found = "is not in COCO's format: it lacks a list of images, annotations or categories"
        remedy = "export the instances (objects), not captions or key points"
        raise DataError.of(path, found, remedy, f"{path} {found}; {remedy}")
    listing = _list_images(root, path, content)
    if len(candidates) > 1:
        others = ", ".join(c.name for c in candidates if c != path)
        odd = Problem(str(path), f"is read, {others} not", "name the file annotations.json", "warning")
        listing = replace(listing, problems=(odd, *listing.problems))
    return listing


def _list_images(root: Path, path: Path, content: dict[str, Any]) -> Listing:
    problems: list[Problem] = []

    def complain(found: str, remedy: str) -> None:
        problems.append(Problem(str(path), found, remedy))

    for table, keys in COCO_KEYS.items():
        for entry in content[table]:
            if wrong := _wrong_entry(entry, keys):
                remedy = "export it again, complete, and the instances (objects), not captions or key points"
                raise DataError.of(path, f"has an entry of {table} {wrong}", remedy)
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
        raise DataError.of(path, "annotates nothing", "outline some objects, and export it again")
    if len(names) >= IGNORE:
        excess = f"has objects of {len(names)} categories, but ids end at 254 (255 is ignored)"
        raise DataError.of(path, excess, "merge some")
    if len({same_name(name) for name in names}) < len(names):
        raise DataError.of(path, f"has several categories of one name among {', '.join(names)}", "merge them")

    found: dict[Any, list[tuple[float, int, Any]]] = {number: [] for number in records}
    for image_id, category, entry in annotations:
        label = f"has annotation {entry.get('id', '?')}"
        if image_id not in records:
            complain(f"{label} of image {image_id}, which it does not list", "export it again")
        elif category not in classes:
            complain(f"{label} of category {category}, which it does not list", "export it again")
        elif wrong := _wrong_segmentation(entry.get("segmentation"), records[image_id]):
            complain(f"{label} of {names_of[image_id]}, which {wrong}", "outline the object, or delete it")
        else:
            crowd = bool(entry.get("iscrowd"))
            area = entry.get("area")
            behind = float("-inf") if crowd else -area if isinstance(area, (int, float)) else 0.0
            found[image_id].append((behind, IGNORE if crowd else classes[category], entry["segmentation"]))

    folder = subfolder(root, "images")
    places = [place for place in (folder, path.parent, root) if place is not None]
    items: list[Item] = []
    listed: set[str] = set()
    for number, record in records.items():
        name = names_of[number]
        file = next((place / name for place in places if is_file(place / name)), None)
        if file is None and folder is not None:  # exporters differ in how much of the path they keep
            file = next((f for f in (folder / Path(name).name,) if is_file(f)), None)
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
