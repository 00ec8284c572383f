"""`svf predict`: find the pictures, segment them, write the results, report."""

import glob
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from svf_lightning.data.folder_files import image_files
from svf_lightning.errors import Problem, printable, problems_of
from svf_lightning.files import replace_file, write_whole
from svf_lightning.own_images.predict import FewShotPredictor, Segmentation
from svf_lightning.progress import Progress
from svf_lightning.schema import checked


def find_queries(arguments: Sequence[str], output: Path) -> tuple[dict[Path, str], list[Problem]]:
    """The pictures that are meant, and a name for the results of each.

    Args:
        arguments: Files, folders (with all folders in them), and patterns such as ``photos/*.jpg``.
        output: The folder of results, which are no queries even if it lies among them.

    Returns:
        Names of the results by picture: its path below the folder given, without its ending unless two would
        get the same. And what could not be found, or not be read.
    """
    names: dict[Path, str] = {}
    failed: list[Problem] = []
    for argument in arguments:
        matches = [argument] if Path(argument).exists() else sorted(glob.glob(argument, recursive=True))
        if not matches:
            pattern = ("no file matches", "check the pattern")
            failed.append(
                Problem(
                    argument, *(pattern if glob.has_magic(argument) else ("is missing", "check the name"))
                )
            )
        for path in map(Path, matches):
            files, problems = image_files(path) if path.is_dir() else ([path], [])
            failed += [problem for problem in problems if problem.severity == "error"]
            for file in files:
                if output.resolve() not in file.resolve().parents:
                    names.setdefault(file, (file.relative_to(path) if path.is_dir() else file).as_posix())
            if path.is_dir() and not files:
                failed.append(Problem(str(path), "holds no images", "name another folder"))
    # Of a file given by itself only its name stays, or ../../x.jpg would be written somewhere else.
    names = {file: Path(name).name if Path(name) == file else name for file, name in names.items()}
    stems = Counter(Path(name).with_suffix("").as_posix().casefold() for name in names.values())
    unique: dict[Path, str] = {}
    for file, name in names.items():
        stem = Path(name).with_suffix("").as_posix()
        chosen = stem if stems[stem.casefold()] == 1 else name
        number = 2
        while chosen in unique.values():
            chosen, number = f"{name}_{number}", number + 1
        unique[file] = chosen
    return unique, list(dict.fromkeys(failed))


def predict_files(
    predictor: FewShotPredictor,
    queries: Mapping[Path, str],
    output: Path,
    *,
    failed: Sequence[Problem] = (),
    probabilities: bool = False,
) -> dict[str, Any]:
    """Segment files and write all results.

    A file that cannot be read, or whose results cannot be written, stops no other. Whatever happens, even an
    interruption, ``predictions.json`` says at the end what was done, what failed and what was not come to::

        output/masks/NAME.png           class ids, shown in colours
        output/overlays/NAME.jpg        the picture with its classes outlined and named
        output/probabilities/NAME/CLASS.png    with ``probabilities``: 0 to 255
        output/predictions.json

    Args:
        predictor: After `fit`.
        queries: Names of the results by file, as `find_queries` gives them.
        output: The folder to write.
        failed: What is known to be missing.
        probabilities: Write them, too.

    Returns:
        The content of ``predictions.json``.

    Raises:
        ValueError: If ``output`` cannot be written at all.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output={output} cannot be made ({error.strerror}): name another folder") from None
    report: dict[str, Any] = {
        "classes": {str(c): name for c, name in enumerate(predictor.class_names, start=1)},
        "supports": {name: len(images) for name, (images, _) in predictor.supports.items()},
        "images": [],
        "failed": [_failure(problem.file, problem) for problem in failed],
        "not_done": [str(file) for file in queries],
    }
    try:
        with Progress("segmenting", len(queries), "images") as progress:
            for source, result in predictor.stream(queries):
                assert isinstance(source, Path)
                try:
                    if isinstance(result, Exception):
                        raise result
                    written = _write(result, queries[source], output, probabilities)
                    report["images"].append({"image": str(source), **written})
                except (ValueError, OSError) as error:
                    (problem,) = problems_of(error, source, "see why, and run again")
                    report["failed"].append(_failure(str(source), problem))
                report["not_done"].remove(str(source))
                progress.advance()
    finally:
        content = checked(report, "predictions", output / "predictions.json")
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_whole(output / "predictions.json", printable(text))
    return report


def print_report(report: Mapping[str, Any], output: Path) -> None:
    """Print what was found how often, and every picture that failed with the reason."""
    counts = Counter(name for image in report["images"] for name in image["classes"])
    found = ", ".join(f"{name} in {counts[name]}" for name in report["classes"].values())
    print(f"segmented {len(report['images'])} pictures into {output}: {found}")
    for entry in report["failed"]:
        print(printable(f"failed: {entry['image']}: {entry['error']}"))
    if report["not_done"]:
        print(f"not done: {len(report['not_done'])} pictures; predictions.json lists them")


def _failure(image: str, problem: Problem) -> dict[str, str]:
    return {"image": image, "error": f"{problem.found}: {problem.remedy}"}


def _write(result: Segmentation, name: str, output: Path, probabilities: bool) -> dict[str, Any]:
    """Write the results of one picture; say where, and what was found."""
    images = {
        "mask": (f"masks/{name}.png", result.palette_mask()),
        "overlay": (f"overlays/{name}.jpg", result.overlay()),
    }
    if probabilities:
        for class_name in result.class_names:
            values = (255 * result.probability(class_name)).round().astype(np.uint8)
            file = f"probabilities/{name}/{_as_file_name(class_name)}.png"
            images[f"probability of {class_name}"] = file, Image.fromarray(values)
    for file, image in images.values():
        path = output / file
        file_format = "JPEG" if path.suffix == ".jpg" else "PNG"  # the file has another name meanwhile
        replace_file(path, partial(image.save, format=file_format, quality=92))
    return {
        "width": result.image.width,
        "height": result.image.height,
        "classes": result.found(),
        **{key: file for key, (file, _) in images.items()},
    }


def _as_file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in " -_." else "_" for letter in name)
