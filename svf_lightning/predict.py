"""Segment your own pictures: a few examples with masks in, masks and overlays of any number of pictures out.

    predictor = FewShotPredictor()                              # or FewShotPredictor("runs/NAME")
    predictor.fit({"cup": ["a.jpg", "b.jpg"]}, {"cup": ["a.png", "b.png"]})
    results = predictor.predict(["table.jpg", "shelf.jpg"])
    results[0].mask                                             # (H, W): 0 background, 1 cup
    results[0].overlay().save("table_overlay.png")

``svf predict`` is the same for files and folders.
"""

import glob
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from svf_lightning import runs
from svf_lightning.analysis.overlays import add_legend, class_colour, tint
from svf_lightning.backbones.efficientnet import efficientnet_lite0
from svf_lightning.backbones.memory import remember_features
from svf_lightning.data.folder import read_item
from svf_lightning.data.index import open_image, replace_file, to_rgb, to_tensor
from svf_lightning.data.listing import image_files, list_folder, pair_masks, printable
from svf_lightning.data.masks import align, displayed, drawn_mask, shrink
from svf_lightning.data.transforms import Letterbox, binary_mask, letterbox_size
from svf_lightning.episode import FOREGROUND, Episode
from svf_lightning.models.prototype import Matcher, Prototypes
from svf_lightning.progress import Progress

Picture: TypeAlias = str | Path | Image.Image | np.ndarray
Pictures: TypeAlias = Picture | Sequence[Picture]  # one, several, or a folder of them

UNNAMED = "object"  # the class of supports that come without a name


@dataclass(frozen=True)
class Segmentation:
    """What was found in one picture."""

    image: Image.Image  # RGB, as displayed
    class_names: tuple[str, ...]  # class id c, from 1 to N, is class_names[c - 1]
    mask: np.ndarray  # (H, W) uint8 at the picture's own size; 0 is background
    margins: Tensor = field(repr=False)  # (N, h, w) log-odds of each class, at the network's resolution

    def probability(self, class_name: str) -> np.ndarray:
        """How likely each pixel shows a class rather than background, in [0, 1], float32, ``(H, W)``."""
        margin = self.margins[self.class_names.index(class_name)]
        return _enlarge(margin, self.mask.shape).sigmoid().numpy()

    def found(self) -> dict[str, dict[str, Any]]:
        """The classes in the mask: pixels, share of the picture, score and box.

        The score is the mean probability over the class's own area, in [0, 1]. A box is left, top, width and
        height in pixels.
        """
        winner = self.margins.argmax(dim=0)
        result = {}
        for class_id, name in enumerate(self.class_names, start=1):
            rows, columns = np.nonzero(self.mask == class_id)
            if not len(rows):
                continue
            margin = self.margins[class_id - 1]
            area = margin[(winner == class_id - 1) & (margin > 0)]
            score = area.sigmoid().mean() if len(area) else margin.max().sigmoid()
            left, top = int(columns.min()), int(rows.min())
            result[name] = {
                "pixels": len(rows),
                "share": round(len(rows) / self.mask.size, 4),
                "score": round(float(score), 4),
                "box": [left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1],
            }
        return result

    def overlay(self) -> Image.Image:
        """The picture with its classes tinted, outlined and named below."""
        shown = [
            class_id for class_id in range(1, len(self.class_names) + 1) if (self.mask == class_id).any()
        ]
        tinted = tint(self.image, self.mask, {class_id: class_colour(class_id) for class_id in shown})
        return add_legend(tinted, [(self.class_names[c - 1], class_colour(c)) for c in shown])

    def palette_mask(self) -> Image.Image:
        """The mask as an image of class ids that viewers show in colours."""
        image = Image.fromarray(self.mask)
        image.putpalette([0, 0, 0, *(channel for c in range(1, 256) for channel in class_colour(c))])
        return image


class FewShotPredictor:
    """Segment pictures by the examples of `fit`, with a trained run or without any training.

    Several classes: each is segmented against its background on its own, and a pixel goes to the class with
    the largest log-odds, or to the background where none is above even.

    Shots: a class may have any number of supports. A head that takes only the number it was trained for, as
    the paper's summing baseline, gets them in groups of that many, and the log-odds of the groups are
    averaged; the last group is filled up with supports from the beginning.

    Supports are read and resized once, in `fit`, and no image goes through the backbone twice: neither the
    supports with the next pictures, nor a picture in which another class is sought. (HSNet takes features
    from inside of the backbone, and computes them every time.)

    Args:
        checkpoint: The folder of a run of ``train.py``; None takes `Matcher` on EfficientNet-Lite0 as
            ImageNet trained it, which comes with pip.
        image_size: Side of the square that a picture is fitted into, in pixels; None takes the run's own, or
            256. More sees smaller things and takes longer.
        batch_size: Pictures that go through the network together.
        device: "cpu", "cuda", ...; None takes a GPU if there is one.

    Raises:
        FileNotFoundError: If the run has no configuration or no checkpoint.
        ValueError: If a number or the device is not possible.
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        image_size: int | None = None,
        batch_size: int = 8,
        device: str | None = None,
    ) -> None:
        if image_size is not None and (type(image_size) is not int or image_size < 32):
            raise ValueError(f"image_size is {image_size!r}; use 32 pixels or more")
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; use 1 or more")
        self.device = _device(device)
        self.shot: int | None = None  # that the head was trained for
        if checkpoint is None:
            self.model: Any = Matcher(efficientnet_lite0())
        else:
            config, segmenter = runs.load_run(checkpoint, classes=(1,))  # no data set is needed
            self.model, self.shot = segmenter.model, config["shot"]
            image_size = image_size or config["data"]["image_size"]
        self.model = self.model.to(self.device).eval()
        self.batch_size = batch_size
        backbone = self.model.backbone
        # For as long as this object lives: supports, and a picture in which several classes are sought.
        self._memory = ExitStack()
        self._memory.enter_context(remember_features(backbone))
        # Padding as in training. The protocol tests on black, which heads take for an object's border.
        self.letterbox = Letterbox(image_size or 256, backbone.mean, backbone.std, pad="mean")
        self.supports: dict[str, tuple[Tensor, Tensor]] = {}  # (K, 3, T, T) and (K, T, T) of each class

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.supports)

    def fit(
        self,
        images: Pictures | Mapping[str, Pictures],
        masks: Pictures | Mapping[str, Pictures] | None = None,
        *,
        shots: int | None = None,
    ) -> "FewShotPredictor":
        """Show what to look for.

        Pictures are files, PIL images or arrays ``(H, W, 3)``; masks are files, PIL images or arrays
        ``(H, W)``, drawn in any of the ways of `drawn_mask`.

        Args:
            images: The supports: a list, or a dict from class names to lists. A folder stands for all
                pictures in it.
            masks: Their masks, in the same form and order; those of a folder are found by their names. None
                if ``images`` is one folder in a layout of `Folder`, with images and masks in it.
            shots: Use no more than so many supports of each class, the first ones; None uses all.

        Returns:
            Itself.

        Raises:
            FileNotFoundError: If a folder or file is missing.
            ValueError: If numbers do not match or files cannot be used; all of those are named.
        """
        if shots is not None and (type(shots) is not int or shots < 1):
            raise ValueError(f"shots is {shots!r}; use 1 or more, or None for all supports")
        bad: list[str] = []
        examples = _examples(images, masks, bad)
        supports = {}
        for name, of_class in examples.items():
            views = [self._view(*example, name, bad) for example in of_class[:shots]]
            seen = [view for view in views if view is not None]
            if seen:
                supports[name] = torch.stack([i for i, _ in seen]), torch.stack([m for _, m in seen])
        if bad:
            raise ValueError(f"{len(bad)} supports cannot be used: {' | '.join(bad)}")
        if not supports:
            raise ValueError("there is no support: give at least one image with its mask")
        if len(supports) > 254:
            raise ValueError(f"{len(supports)} classes are more than the 254 that a mask can name; use fewer")
        self.supports = {name: (i.to(self.device), m.to(self.device)) for name, (i, m) in supports.items()}
        self._learn()
        return self

    def predict(self, images: Pictures) -> list[Segmentation]:
        """Segment pictures.

        Args:
            images: One, several, or a folder of them; files, PIL images or arrays.

        Returns:
            One result per picture, in their order.

        Raises:
            ValueError: At the first picture that cannot be read. `stream` goes on instead.
        """
        results = []
        for _, result in self.stream(_several(images)):
            if isinstance(result, Exception):
                raise result
            results.append(result)
        return results

    def stream(self, images: Iterable[Picture]) -> Iterator[tuple[Picture, Segmentation | Exception]]:
        """Segment pictures one batch at a time.

        Yields:
            Each picture as it was given, with its result, or with the error why there is none.
        """
        if not self.supports:
            raise ValueError("nothing to look for yet: call fit(images, masks) first")
        batch: list[tuple[Picture, Image.Image | Exception]] = []
        for source in images:
            try:
                batch.append((source, _read_picture(source)))
            except (ValueError, OSError) as error:
                batch.append((source, error))
            if len(batch) == self.batch_size:
                yield from self._segment(batch)
                batch = []
        yield from self._segment(batch)

    def describe(self) -> str:
        """The method and what it knows, in one line."""
        shown = ", ".join(f"{name} ({len(images)})" for name, (images, _) in self.supports.items())
        text = f"{type(self.model).__name__} at {self.letterbox.size} pixels; supports: {shown}"
        if isinstance(self.model, Matcher):
            return text
        split = {name: groups for name, groups in self._groups.items() if len(groups) > 1}
        if split:
            counts = ", ".join(f"{name} in {len(groups)}" for name, groups in split.items())
            text += f"; in groups of {self.shot}, which this head was trained for: {counts}"
        return text

    @torch.inference_mode()
    def _learn(self) -> None:
        """All that can be computed of the supports before the first query comes."""
        if isinstance(self.model, Matcher):
            learned = [self.model.prototypes(i[None], m[None]) for i, m in self.supports.values()]
            self._prototypes = Prototypes(*(torch.cat(side) for side in zip(*learned, strict=True)))  # (N, C)
            return
        self._groups = {name: self._group(len(images)) for name, (images, _) in self.supports.items()}

    def _group(self, supports: int) -> list[list[int]]:
        """Positions of the supports that go through the head together."""
        whole = [list(range(supports))]
        if supports == self.shot or self._takes(supports):
            return whole
        shot = self.shot or 1
        starts = range(0, supports, shot)
        return [[(start + k) % supports for k in range(shot)] for start in starts]

    def _takes(self, shots: int) -> bool:
        """Whether the head takes another number of shots than it was trained for; only it can tell."""
        side = min(self.letterbox.size, 65)
        blank = torch.zeros(1, shots, 3, side, side, device=self.device)
        mask = torch.ones(1, shots, side, side, dtype=torch.long, device=self.device)
        try:
            self.model(Episode(blank[:, 0], mask[:, 0], blank, mask, torch.tensor([1], device=self.device)))
        except ValueError:
            return False
        return True

    def _view(self, image: Image.Image, mask: np.ndarray, what: str, name: str, bad: list[str]) -> Any:
        """A support as the network gets it; None, and a line in ``bad``, if nothing of the object is left."""
        view, label = self._fit(image, mask)
        if not (label == FOREGROUND).any():
            drawn = int((mask == FOREGROUND).sum())
            remedy = "cut the picture closer to it, or raise image_size" if drawn else "draw the object in it"
            bad.append(f"{what}: the mask of {name} marks {drawn} pixels, too few to see: {remedy}")
            return None
        return view, label.long()

    def _fit(self, image: Image.Image, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        # The letterbox samples without averaging, which breaks up pictures far larger than itself.
        small, small_mask = shrink(image, mask, 2 * self.letterbox.size)
        return self.letterbox(to_tensor(small), torch.from_numpy(small_mask))

    @torch.inference_mode()
    def _segment(
        self, batch: Sequence[tuple[Picture, Image.Image | Exception]]
    ) -> Iterator[tuple[Picture, Segmentation | Exception]]:
        pictures = [picture for _, picture in batch if isinstance(picture, Image.Image)]
        margins: Iterator[Tensor] = iter(())
        if pictures:
            views = [self._fit(p, np.zeros((p.height, p.width), np.uint8))[0] for p in pictures]
            margins = iter(self._margins(torch.stack(views).to(self.device)).float().cpu())
        for source, picture in batch:
            if isinstance(picture, Exception):
                yield source, picture
                continue
            rows, columns = letterbox_size(picture.height, picture.width, self.letterbox.size)
            margin = next(margins)[:, :rows, :columns].clone()  # without the padding
            mask = _largest(margin, (picture.height, picture.width))
            yield source, Segmentation(picture, self.class_names, mask, margin)

    def _margins(self, queries: Tensor) -> Tensor:
        """Log-odds of each class against its background, for queries ``(B, 3, T, T)``: ``(B, N, T, T)``."""
        batch, size = len(queries), queries.shape[-2:]
        if isinstance(self.model, Matcher):
            features = self.model.features(queries)
            per_class = [
                Prototypes(*(side[c].expand(batch, -1) for side in self._prototypes))
                for c in range(len(self.supports))
            ]
            logits = [self.model.compare(features, prototypes, size).logits for prototypes in per_class]
            return torch.stack([each[:, 1] - each[:, 0] for each in logits], dim=1)
        result = []
        blank = queries.new_zeros(batch, *size, dtype=torch.long)
        for class_id, (name, (images, masks)) in enumerate(self.supports.items(), start=1):
            number = torch.full((batch,), class_id, device=queries.device)
            margin = torch.zeros_like(queries[:, 0])
            for group in self._groups[name]:
                shots = images[group].expand(batch, -1, -1, -1, -1), masks[group].expand(batch, -1, -1, -1)
                logits = self.model(Episode(queries, blank, *shots, number)).logits.float()
                margin += (logits[:, 1] - logits[:, 0]) / len(self._groups[name])
            result.append(margin)
        return torch.stack(result, dim=1)


def support_pairs(
    images: Sequence[Path], masks: Sequence[Path], class_names: Sequence[str]
) -> tuple[dict[str, list[Picture]], dict[str, list[Picture]]]:
    """Supports by class, from the options of ``svf predict``.

    Args:
        images: Files, or folders of images.
        masks: As many files, or folders with the masks of those images.
        class_names: None for one class without a name, one for all, or one for each.

    Raises:
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
    bad: list[str] = []
    for name, image, mask in zip(names, images, masks, strict=True):
        pairs = _paired(image, mask, bad)
        all_images[name] += [first for first, _ in pairs]
        all_masks[name] += [second for _, second in pairs]
    if bad:
        raise ValueError(f"{len(bad)} supports cannot be used: {' | '.join(bad)}")
    return all_images, all_masks


def find_queries(arguments: Sequence[str], output: Path) -> tuple[dict[Path, str], dict[str, str]]:
    """The pictures that are meant, and a name for the results of each.

    Args:
        arguments: Files, folders (with all folders in them), and patterns such as ``photos/*.jpg``.
        output: The folder of results, which are no queries even if it lies among them.

    Returns:
        Names of the results by picture: its path below the folder given, without its ending unless two would
        get the same. And what could not be found, with the reason.
    """
    names: dict[Path, str] = {}
    failed: dict[str, str] = {}
    for argument in arguments:
        matches = [argument] if Path(argument).exists() else sorted(glob.glob(argument, recursive=True))
        if not matches:
            pattern = glob.has_magic(argument)
            failed[argument] = (
                "no file matches: check the pattern" if pattern else "is missing: check the name"
            )
        for path in map(Path, matches):
            files, problems = image_files(path) if path.is_dir() else ([path], [])
            failed |= {p.file: f"{p.found}: {p.remedy}" for p in problems if p.severity == "error"}
            for file in files:
                if output.resolve() not in file.resolve().parents:
                    names.setdefault(file, (file.relative_to(path) if path.is_dir() else file).as_posix())
            if path.is_dir() and not files:
                failed[str(path)] = "holds no images: name another folder"
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
    return unique, failed


def predict_files(
    predictor: FewShotPredictor,
    queries: Mapping[Path, str],
    output: Path,
    *,
    failed: Mapping[str, str] | None = None,
    probabilities: bool = False,
    about: Mapping[str, Any] | None = None,
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
        failed: What is known to be missing, with the reason.
        probabilities: Write them, too.
        about: Put into ``predictions.json`` as it is.

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
        **(about or {}),
        "classes": {str(c): name for c, name in enumerate(predictor.class_names, start=1)},
        "supports": {name: len(images) for name, (images, _) in predictor.supports.items()},
        "images": [],
        "failed": [{"image": file, "error": reason} for file, reason in (failed or {}).items()],
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
                    report["failed"].append({"image": str(source), "error": str(error)})
                report["not_done"].remove(str(source))
                progress.advance()
    finally:
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        runs.write_whole(output / "predictions.json", printable(text))
    return report


def print_report(report: Mapping[str, Any], output: Path) -> None:
    """Print what was found how often, and every picture that failed with the reason."""
    counts = Counter(name for image in report["images"] for name in image["classes"])
    found = ", ".join(f"{name} in {counts[name]}" for name in report["classes"].values())
    print(f"segmented {len(report['images'])} pictures into {output}: {found}")
    for entry in report["failed"]:
        reason = entry["error"].removeprefix(entry["image"]).lstrip(": ")
        print(printable(f"failed: {entry['image']}: {reason}"))
    if report["not_done"]:
        print(f"not done: {len(report['not_done'])} pictures; predictions.json lists them")


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
        path.parent.mkdir(parents=True, exist_ok=True)
        file_format = "JPEG" if path.suffix == ".jpg" else "PNG"  # the file has another name meanwhile
        replace_file(path, partial(image.save, format=file_format, quality=92))
    return {
        "width": result.image.width,
        "height": result.image.height,
        "classes": result.found(),
        **{key: file for key, (file, _) in images.items()},
    }


Example: TypeAlias = tuple[Image.Image, np.ndarray, str]  # picture, mask (0, 1, 255), what to call it


def _examples(images: Any, masks: Any, bad: list[str]) -> dict[str, list[Example]]:
    """The supports of every class; what cannot be used goes into ``bad``."""
    if masks is None:
        if not isinstance(images, (str, Path)):
            raise ValueError(
                "masks are missing: give each support its mask, or a folder with images and masks"
            )
        return _folder_examples(Path(images), bad)
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
    for name in images:
        examples[name] = []
        for image, mask in _paired(images[name], masks[name], bad):
            try:
                examples[name].append(_read_support(image, mask))
            except (ValueError, OSError) as error:
                bad.append(str(error))
    return examples


def _folder_examples(folder: Path, bad: list[str]) -> dict[str, list[Example]]:
    listing = list_folder(folder)
    bad += [str(problem) for problem in listing.problems if problem.severity == "error"]
    names = listing.class_names
    examples: dict[str, list[Example]] = {name: [] for name in names}
    for item in listing.items:
        try:
            image, label = read_item(item, len(names))
        except (ValueError, OSError) as error:
            bad.append(str(error))
            continue
        shown = [c for c in range(1, len(names) + 1) if (label == c).any()]
        for class_id in [item.class_id] if item.class_id else shown:
            mask = binary_mask(torch.from_numpy(label), class_id).numpy()
            examples[names[class_id - 1]].append((image, mask, item.id))
    return {name: of_class for name, of_class in examples.items() if of_class}


def _paired(images: Any, masks: Any, bad: list[str]) -> list[tuple[Picture, Picture]]:
    """Each image with its mask: by name in folders, by place in lists."""
    folders = [isinstance(p, (str, Path)) and Path(p).is_dir() for p in (images, masks)]
    if all(folders):
        files, problems = image_files(Path(images))
        mask_files, others = image_files(Path(masks))
        pairs, unpaired = pair_masks(files, Path(images), mask_files, Path(masks))
        bad += [str(p) for p in (*problems, *others, *unpaired) if p.severity == "error"]
        if not pairs and not bad:
            raise ValueError(f"{images} holds no images: name another folder")
        return list(pairs)
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
    return list(zip(image_list, mask_list, strict=True))


def _several(images: Pictures) -> Sequence[Picture]:
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
        raise ValueError(f"{what} is a {type(source).__name__}; give a file, a PIL image or an array")
    array = source
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"{what} is an array of shape {array.shape}; it must be (H, W) or (H, W, 3)")
    if array.dtype == bool:
        array = array.astype(np.uint8)
    elif array.dtype.kind == "f" and array.ndim == 3:
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(
                f"{what} is a float array from {array.min():g} to {array.max():g}; scale it to [0, 1]"
            )
        array = (255 * array).round().astype(np.uint8)
    elif array.dtype.kind == "f":
        array = array.astype(np.float32)
    elif array.dtype != np.uint8:
        if array.min() < 0 or array.max() > (255 if array.ndim == 3 else 65535):
            raise ValueError(f"{what} holds {array.min()} to {array.max()}; it must hold 0 to 255")
        array = array.astype(np.uint8 if array.max() <= 255 else np.uint16)
    return Image.fromarray(array)


def _read_picture(source: Picture) -> Image.Image:
    return to_rgb(displayed(_open(source, "a query")))


def _read_support(image: Picture, mask: Picture) -> Example:
    what = str(image) if isinstance(image, (str, Path)) else "a support"
    turned, drawn = align(_open(image, what), _open(mask, f"the mask of {what}"))
    try:
        return to_rgb(turned), drawn_mask(drawn), what
    except ValueError as error:
        raise ValueError(
            f"{mask if isinstance(mask, (str, Path)) else 'the mask of ' + what}: {error}"
        ) from None


def _enlarge(margin: Tensor, size: Sequence[int]) -> Tensor:
    """A map ``(h, w)`` at a picture's own size, the inverse of how the picture was shrunk."""
    # Not the protocol's rule, which is up to 5% off as it ignores that letterboxes round to multiples of 8.
    return F.interpolate(margin[None, None], (size[0], size[1]), mode="bilinear", align_corners=False)[0, 0]


def _largest(margins: Tensor, size: tuple[int, int]) -> np.ndarray:
    """The class with the largest log-odds above 0 at each pixel, ``(H, W)`` uint8."""
    mask = torch.zeros(size, dtype=torch.uint8)
    best = torch.zeros(size)
    for class_id, margin in enumerate(margins, start=1):  # one by one: a photograph times N classes is much
        enlarged = _enlarge(margin, size)
        mask[enlarged > best] = class_id
        best = torch.maximum(best, enlarged)
    return mask.numpy()


def _as_file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in " -_." else "_" for letter in name)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used ({reason}); use cpu, or leave it away") from None
    return device
