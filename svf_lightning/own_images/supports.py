"""Read the labelled examples (supports) that a user gives, from files, folders, images or arrays."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from svf_lightning.data.folder import read_item
from svf_lightning.data.folder_files import image_files, pair_masks
from svf_lightning.data.folder_layouts import list_folder
from svf_lightning.data.images import open_image, to_rgb
from svf_lightning.data.masks import align, displayed, drawn_mask
from svf_lightning.data.transforms import binary_mask
from svf_lightning.errors import DataError, Problem

Picture: TypeAlias = str | Path | Image.Image | np.ndarray
Pictures: TypeAlias = Picture | Sequence[Picture]  # one, several, or a folder of them
UNNAMED = "object"  # the class of supports that come without a name


def support_pairs(
    images: Sequence[Path], masks: Sequence[Path], class_names: Sequence[str]
) -> tuple[dict[str, list[Picture]], dict[str, list[Picture]]]:
    """Supports by class, from the options of ``svf predict``.

    Args:
        images: Files, or folders of images.
        masks: As many files, or folders with the masks of those images.
        class_names: None for one class without a name, one for all, or one for each.

    Raises:
        DataError: If an image or a mask has no partner.
        ValueError: If the numbers do not match.
    """
    if len(images) != len(masks):
        raise ValueError(
            f"there are {len(images)} --support-image and {len(masks)} --support-mask; give each image "
            "its mask"
        )
    if len(class_names) not in (0, 1, len(images)):
        raise ValueError(
            f"there are {len(class_names)} --class-name for {len(images)} supports; give one for all, or "
            "each support its own"
        )
    names = (
        [UNNAMED] * len(images) if not class_names else list(class_names) * (len(images) // len(class_names))
    )
    all_images: dict[str, list[Picture]] = {name: [] for name in names}
    all_masks: dict[str, list[Picture]] = {name: [] for name in names}
    errors: list[DataError] = []
    for name, image, mask in zip(names, images, masks, strict=True):
        pairs, unpaired = _paired(image, mask)
        errors += unpaired
        all_images[name] += [first for first, _ in pairs]
        all_masks[name] += [second for _, second in pairs]
    refuse(errors)
    return all_images, all_masks


def refuse(errors: Sequence[DataError]) -> None:
    """Raise one error that names every support that cannot be used, if there are any."""
    if errors:
        message = f"{len(errors)} supports cannot be used: {' | '.join(map(str, errors))}"
        raise DataError(message, [problem for error in errors for problem in error.problems])


Example: TypeAlias = tuple[Image.Image, np.ndarray, str]  # picture, mask (0, 1, 255), what to call it


def read_supports(images: Any, masks: Any) -> tuple[dict[str, list[Example]], list[DataError]]:
    """The supports of every class, and an error for each that cannot be used.

    Raises:
        ValueError: If images and masks do not correspond.
    """
    if masks is None:
        if not isinstance(images, (str, Path)):
            raise ValueError(
                "masks are missing: give each support its mask, or a folder with images and masks"
            )
        return _folder_examples(Path(images))
    if isinstance(images, Mapping) != isinstance(masks, Mapping):
        raise ValueError(
            "images and masks differ in form: give two lists, or two dicts from class names to lists"
        )
    if not isinstance(images, Mapping):
        images, masks = {UNNAMED: images}, {UNNAMED: masks}
    if images.keys() != masks.keys():
        odd = ", ".join(map(str, images.keys() ^ masks.keys()))
        raise ValueError(f"{odd} has images or masks, but not both: give both for each class")
    examples: dict[str, list[Example]] = {}
    errors: list[DataError] = []
    for name in images:
        examples[name] = []
        pairs, unpaired = _paired(images[name], masks[name])
        errors += unpaired
        for image, mask in pairs:
            try:
                examples[name].append(_read_support(image, mask))
            except DataError as error:
                errors.append(error)
    return examples, errors


def _folder_examples(folder: Path) -> tuple[dict[str, list[Example]], list[DataError]]:
    listing = list_folder(folder)
    errors = _errors(listing.problems)
    names = listing.class_names
    examples: dict[str, list[Example]] = {name: [] for name in names}
    for item in listing.items:
        try:
            image, label = read_item(item, len(names))
        except DataError as error:
            errors.append(error)
            continue
        shown = [c for c in range(1, len(names) + 1) if (label == c).any()]
        for class_id in [item.class_id] if item.class_id else shown:
            mask = binary_mask(torch.from_numpy(label), class_id).numpy()
            examples[names[class_id - 1]].append((image, mask, item.id))
    return {name: of_class for name, of_class in examples.items() if of_class}, errors


def _errors(problems: Sequence[Problem]) -> list[DataError]:
    return [DataError(str(problem), [problem]) for problem in problems if problem.severity == "error"]


def _paired(images: Any, masks: Any) -> tuple[list[tuple[Picture, Picture]], list[DataError]]:
    """Each image with its mask, by name in folders and by place in lists; and files without a partner."""
    folders = [isinstance(p, (str, Path)) and Path(p).is_dir() for p in (images, masks)]
    if all(folders):
        files, problems = image_files(Path(images))
        mask_files, others = image_files(Path(masks))
        pairs, unpaired = pair_masks(files, Path(images), mask_files, Path(masks))
        errors = _errors([*problems, *others, *unpaired])
        if not pairs and not errors:
            raise DataError.of(images, "holds no images", "name another folder")
        return list(pairs), errors
    if any(folders):
        raise ValueError(
            f"one of {images} and {masks} is a folder and the other not; give two folders or two files"
        )
    image_list, mask_list = (
        [p] if isinstance(p, (str, Path, Image.Image, np.ndarray)) else list(p) for p in (images, masks)
    )
    if len(image_list) != len(mask_list):
        raise ValueError(
            f"there are {len(image_list)} images and {len(mask_list)} masks; give each image its mask"
        )
    return list(zip(image_list, mask_list, strict=True)), []


def several(images: Pictures) -> Sequence[Picture]:
    if isinstance(images, (str, Path)) and Path(images).is_dir():
        return list(image_files(Path(images))[0])
    return [images] if isinstance(images, (str, Path, Image.Image, np.ndarray)) else images


def _open(source: Picture, what: str) -> Image.Image:
    """A picture or mask from whatever it came as, as stored."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, (str, Path)):
        return open_image(source)
    if not isinstance(source, np.ndarray):
        raise _unfit(what, f"is a {type(source).__name__}", "give a file, a PIL image or an array")
    array = source
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise _unfit(what, f"is an array of shape {array.shape}", "it must be (H, W) or (H, W, 3)")
    if array.dtype == bool:
        array = array.astype(np.uint8)
    elif array.dtype.kind == "f" and array.ndim == 3:
        if not (array.min() >= 0 and array.max() <= 1):
            found = f"is a float array from {array.min():g} to {array.max():g}"
            raise _unfit(what, found, "scale it to [0, 1]")
        array = (255 * array).round().astype(np.uint8)
    elif array.dtype.kind == "f":
        array = array.astype(np.float32)
    elif array.dtype != np.uint8:
        if array.min() < 0 or array.max() > (255 if array.ndim == 3 else 65535):
            raise _unfit(what, f"holds {array.min()} to {array.max()}", "it must hold 0 to 255")
        array = array.astype(np.uint8 if array.max() <= 255 else np.uint16)
    return Image.fromarray(array)


def _unfit(what: str, found: str, remedy: str) -> DataError:
    return DataError.of(what, found, remedy, f"{what} {found}; {remedy}")


def read_query(source: Picture) -> Image.Image:
    return to_rgb(displayed(_open(source, "a query")))


def _read_support(image: Picture, mask: Picture) -> Example:
    what = str(image) if isinstance(image, (str, Path)) else "a support"
    opened, drawn = _open(image, what), _open(mask, f"the mask of {what}")
    try:
        opened, drawn = align(opened, drawn)
        return to_rgb(opened), drawn_mask(drawn), what
    except DataError as error:
        (problem,) = error.problems
        file = mask if isinstance(mask, (str, Path)) else problem.file
        raise DataError.of(file, problem.found, problem.remedy) from None
