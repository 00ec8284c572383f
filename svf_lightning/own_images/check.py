"""What ``svf check`` says about a folder: what was understood, and everything that is wrong."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from svf_lightning.analysis.overlays import SheetRow, class_colour, contact_sheet, tint
from svf_lightning.data.coco import YEARS, Coco
from svf_lightning.data.emoji import MARKER, Emoji
from svf_lightning.data.folder import examine, read_item
from svf_lightning.data.folder_files import below
from svf_lightning.data.folder_layouts import LAYOUTS, list_folder
from svf_lightning.data.fss1000 import Fss1000
from svf_lightning.data.masks import shrink
from svf_lightning.data.pascal import IMAGES, Pascal
from svf_lightning.data.source import Source
from svf_lightning.errors import Problem, printable, problems_of

LARGE = 2048  # pixels; reading larger pictures takes most of the time of training
PICTURES = 8  # of a class on the contact sheet
REMEDY = "mend it, and check again"  # for errors that bring none
CELL = 132  # pixels on a side that one of them gets


@dataclass
class Survey:
    """What a folder holds."""

    root: Path
    layout: str  # its name
    about: str = ""  # what the layout is
    class_names: Sequence[str] = ()
    ids: list[str] = field(default_factory=list)  # of the usable images
    sizes: list[tuple[int, int]] = field(default_factory=list)  # width and height
    pixels: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.int64))  # (images, N + 1)
    read: Callable[[int], tuple[Image.Image, np.ndarray]] | None = None  # a picture and its label, small
    problems: list[Problem] = field(default_factory=list)

    def count(self, severity: str) -> int:
        return sum(problem.severity == severity for problem in self.problems)

    def shares(self, class_id: int) -> np.ndarray:
        """Share of the picture that a class fills, in every image that shows it."""
        shown = self.pixels[self.pixels[:, class_id] > 0]
        return shown[:, class_id] / shown.sum(axis=1)


def check(root: str | Path, layout: str = "auto", shot: int = 1, min_share: float = 0.001) -> Survey:
    """Look at every file of a data set: the user's own, or a published one in its own layout.

    Args:
        root: The folder.
        layout: A layout of `Folder`, or "auto".
        shot: Supports that an episode is to have; a class with too few images for it is an error.
            0 asks for one image per class, as for the supports of ``svf predict``.
        min_share: Share of its picture below which an object counts as not shown.

    Returns:
        What was found. Whatever is wrong is in its ``problems``; nothing is raised for it.
    """
    root = Path(root)
    source = _published(root) if layout == "auto" and root.is_dir() else None
    survey = _survey_source(root, source) if source is not None else _survey_folder(root, layout, min_share)
    if len(survey.pixels):
        survey.problems += _too_few(survey, shot, min_share)
    survey.problems.sort(key=lambda problem: problem.severity)  # errors first; the order stays else
    return survey


def print_survey(survey: Survey) -> None:
    """Print classes, counts, sizes and shares, and every problem with its remedy."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    images = len(survey.ids)
    console.print(f"[bold]{escape(printable(str(survey.root)))}[/]: layout {survey.layout}: {survey.about}")
    if images:
        console.print(f"{images} usable images of {len(survey.class_names)} classes{_sizes(survey.sizes)}")
        table = Table()
        for column in ("id", "class", "images", "smallest", "median", "largest"):
            table.add_column(column, justify="left" if column == "class" else "right")
        for class_id, name in enumerate(survey.class_names, start=1):
            if len(survey.class_names) > 100 and class_id > 100:
                continue
            shares = survey.shares(class_id)
            range_of = (
                [f"{100 * s:.1f}%" for s in np.quantile(shares, (0, 0.5, 1))] if len(shares) else ["-"] * 3
            )
            table.add_row(str(class_id), escape(name), str(len(shares)), *range_of)
        console.print(table, "smallest, median, largest: share of the picture that the class fills")
    for problem in survey.problems:
        mark = "[bold red]error[/]  " if problem.severity == "error" else "[yellow]warning[/]"
        console.print(f"{mark} {escape(printable(problem.file))}: {escape(printable(problem.found))}")
        console.print(f"        [dim]→ {escape(printable(problem.remedy))}[/]")
    counts = (survey.count("error"), "error"), (survey.count("warning"), "warning"), (images, "usable image")
    console.print(", ".join(f"{count} {what}{'' if count == 1 else 's'}" for count, what in counts))


def draw_survey(survey: Survey, path: Path) -> None:
    """Write a contact sheet: some pictures of every class with their masks.

    Args:
        survey: With at least one usable image.
        path: The PNG to write.
    """
    assert survey.read is not None
    rows = []
    for class_id, name in enumerate(survey.class_names, start=1):
        positions = np.flatnonzero(survey.pixels[:, class_id])
        chosen = positions[
            np.linspace(0, len(positions) - 1, min(PICTURES, len(positions))).round().astype(int)
        ]
        pictures = []
        for position in chosen:
            image, label = survey.read(int(position))
            image, label = shrink(image, label, CELL)
            picture = tint(image, label, {class_id: class_colour(class_id)})
            pictures.append((survey.ids[position].removeprefix(f"{name}/"), picture))
        shares = survey.shares(class_id)
        fills = f"\nfills {100 * np.median(shares):.1f}%" if len(shares) else ""
        if name:
            rows.append(SheetRow(f"{class_id} {name}", f"{len(positions)} images{fills}", pictures))
    note = f"layout {survey.layout}, {len(survey.ids)} images{_sizes(survey.sizes)}"
    contact_sheet(survey.root.absolute().name, note, rows[:60], path, CELL)


def _survey_folder(root: Path, layout: str, min_share: float) -> Survey:
    try:
        listing = list_folder(root, layout)
    except (OSError, ValueError) as error:
        problems = [_of_folder(problem, root) for problem in problems_of(error, root, REMEDY)]
        return Survey(root, "unknown", "none of those that are read", problems=problems)
    survey = Survey(root, listing.layout, LAYOUTS[listing.layout], listing.class_names)
    survey.problems += listing.problems
    results = list(examine(listing))
    for result in results:
        survey.problems += (p._replace(file=below(p.file, root)) for p in result.problems)
    usable = [result for result in results if result.counts is not None]
    if not usable:
        if not survey.problems:
            survey.problems.append(Problem(str(root), "holds no image", "put some into it"))
        return survey
    survey.ids = [result.item.id for result in usable]
    survey.sizes = [result.size for result in usable if result.size is not None]
    survey.pixels = np.stack([result.counts for result in usable if result.counts is not None])
    items, classes = [result.item for result in usable], len(listing.class_names)
    survey.read = lambda position: read_item(items[position], classes, long_side=320)
    survey.problems += _twins([item.image for item in items], root)
    for item, counts in zip(items, survey.pixels, strict=True):
        for class_id in np.flatnonzero(counts[1:]) + 1:
            share = counts[class_id] / counts.sum()
            if share < min_share:
                name = listing.class_names[class_id - 1]
                found = f"shows {counts[class_id]} pixels of {name}, {100 * share:.2g}% of the picture"
                remedy = f"cut the picture closer, or use data.source.min_share={0.5 * share:.1g}"
                file = below(str(item.mask or item.image), root)
                survey.problems.append(Problem(file, found, f"it is no support; {remedy}", "warning"))
    large = [(size, item) for size, item in zip(survey.sizes, items, strict=True) if max(size) > LARGE]
    if large:
        (width, height), item = max(large, key=lambda pair: max(pair[0]))
        found = f"is {width}x{height}, and {len(large)} pictures have sides of over {LARGE} pixels"
        remedy = "reading them takes most of the time of training; shrink copies to 1024 pixels or so"
        survey.problems.append(Problem(below(str(item.image), root), found, remedy, "warning"))
    return survey


def _survey_source(root: Path, source: Source) -> Survey:
    """A published data set, through its own reader."""
    survey = Survey(root, source.name, "as it is published")
    try:
        source.ensure()
        survey.class_names = source.class_names
        indices = [source.index("train"), source.index("val")]
    except (OSError, ValueError) as error:
        survey.problems += (
            problem._replace(file=below(problem.file, root)) for problem in problems_of(error, root, REMEDY)
        )
        return survey
    if source.name == "fss1000":  # both splits are all images there
        indices = indices[:1]
    survey.ids = [image_id for index in indices for image_id in index.ids]
    survey.pixels = np.concatenate([index.pixels for index in indices])

    def read(position: int) -> tuple[Image.Image, np.ndarray]:
        first = len(indices[0])
        image, label = indices[position >= first].read(position - first * (position >= first))
        return Image.fromarray(image.permute(1, 2, 0).numpy()), label.numpy()

    survey.read = read
    return survey


def _published(root: Path) -> Source | None:
    """The data set whose layout a folder has, if it is a published one's."""
    if (root / MARKER).is_file():
        try:
            settings = json.loads((root / MARKER).read_text(encoding="utf-8"))
            return Emoji(root, **{key: value for key, value in settings.items() if key != "generator"})
        except (ValueError, TypeError, AttributeError):
            return Emoji(root)  # which says that the file is damaged
    if (root / IMAGES).is_dir():
        return Pascal(root)
    for year in YEARS:
        if (root / f"train{year}").is_dir() or (root / f"val{year}").is_dir():
            return Coco(root, year=year)
    if (root / "splits" / "fss").is_dir():
        return Fss1000(root)
    return None


def _too_few(survey: Survey, shot: int, min_share: float) -> list[Problem]:
    """Classes that no episode can be drawn from."""
    problems = []
    areas = survey.pixels.sum(axis=1)
    for class_id, name in enumerate(survey.class_names, start=1):
        images = int((survey.pixels[:, class_id] >= np.maximum(1, min_share * areas)).sum())
        if name and images < shot + 1:
            found = f"has {images} usable images, but an episode takes {shot + 1}: a query and {shot} shots"
            found = found.replace("1 shots", "its support") if shot == 1 else found
            remedy = "add images, or train with a lower shot"
            problems.append(Problem(f"class {name}", found, remedy))
    if len(survey.class_names) == 1 and shot:
        remedy = "training needs another class to learn from; `svf predict` works with one"
        problems.append(Problem(f"class {survey.class_names[0]}", "is the only one", remedy, "warning"))
    return problems


def _twins(files: Iterable[Path], root: Path) -> list[Problem]:
    """Files with the same content: a query that is its own support measures nothing."""
    by_size = defaultdict(list)
    for file in files:
        by_size[file.stat().st_size].append(file)
    first: dict[bytes, Path] = {}
    problems = []
    for same_size in by_size.values():
        for file in same_size if len(same_size) > 1 else ():
            content = hashlib.sha256(file.read_bytes()).digest()
            if content in first:
                found = f"is the same picture as {below(str(first[content]), root)}"
                remedy = "delete one; a query that is its own support, or was trained on, measures nothing"
                problems.append(Problem(below(str(file), root), found, remedy, "warning"))
            first.setdefault(content, file)
    return problems


def _of_folder(problem: Problem, root: Path) -> Problem:
    """A problem that keeps the whole folder from being used, whichever file it lies in."""
    file = below(problem.file, root)
    found = problem.found if file == str(root) else f"{file} {problem.found}"
    return problem._replace(file=str(root), found=found)


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    if not sizes:
        return ""
    small, large = min(sizes, key=lambda s: s[0] * s[1]), max(sizes, key=lambda s: s[0] * s[1])
    span = f"{small[0]}x{small[1]}" + (f" to {large[0]}x{large[1]}" if small != large else "")
    return f", {span} pixels"
