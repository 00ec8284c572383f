"""Segment your own pictures by a few examples with masks.

    predictor = FewShotPredictor()                              # or FewShotPredictor("runs/NAME")
    predictor.fit({"cup": ["a.jpg", "b.jpg"]}, {"cup": ["a.png", "b.png"]})
    results = predictor.predict(["table.jpg", "shelf.jpg"])
    results[0].mask                                             # (H, W): 0 background, 1 cup
    results[0].overlay().save("table_overlay.png")

``svf predict`` is the same for files and folders.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from svf_lightning.analysis.overlays import add_legend, class_colour, tint
from svf_lightning.backbones.efficientnet import efficientnet_lite0
from svf_lightning.backbones.feature_cache import remember_features
from svf_lightning.data.images import to_tensor
from svf_lightning.data.masks import shrink
from svf_lightning.data.transforms import Letterbox, letterbox_size
from svf_lightning.episode import FOREGROUND, Episode
from svf_lightning.errors import DataError
from svf_lightning.models.prototype import Matcher, Prototypes
from svf_lightning.own_images.supports import Picture, Pictures, read_query, read_supports, refuse, several
from svf_lightning.runs.run import load_run


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
        trust: Modules that the run's configuration may call, beside the parts of a run in this package.

    Raises:
        FileNotFoundError: If the run has no configuration or no checkpoint.
        ValueError: If a number or the device is not possible, or the run wants to call code that is not
            trusted.
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        image_size: int | None = None,
        batch_size: int = 8,
        device: str | None = None,
        trust: str | Sequence[str] = (),
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
            config, segmenter = load_run(checkpoint, classes=(1,), trust=trust)  # no data set is needed
            self.model, self.shot = segmenter.model, config["shot"]
            image_size = image_size or config["data"]["image_size"]
        self.model = self.model.to(self.device).eval()
        self.batch_size = batch_size
        backbone = self.model.backbone
        # For as long as this object lives: supports, and a picture in which several classes are sought.
        self._cache = ExitStack()
        self._cache.enter_context(remember_features(backbone))
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
        examples, errors = read_supports(images, masks)
        supports = {}
        for name, of_class in examples.items():
            seen = []
            for example in of_class[:shots]:
                try:
                    seen.append(self._view(*example, name))
                except DataError as error:
                    errors.append(error)
            if seen:
                supports[name] = torch.stack([i for i, _ in seen]), torch.stack([m for _, m in seen])
        refuse(errors)
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
        for _, result in self.stream(several(images)):
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
                batch.append((source, read_query(source)))
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
        if supports == self.shot or getattr(self.model, "any_shot", False):
            return whole
        shot = self.shot or 1
        starts = range(0, supports, shot)
        return [[(start + k) % supports for k in range(shot)] for start in starts]

    def _view(self, image: Image.Image, mask: np.ndarray, what: str, name: str) -> tuple[Tensor, Tensor]:
        """A support as the network gets it; a `DataError` if nothing of the object is left."""
        view, label = self._fit(image, mask)
        if not (label == FOREGROUND).any():
            drawn = int((mask == FOREGROUND).sum())
            remedy = "cut the picture closer to it, or raise image_size" if drawn else "draw the object in it"
            found = f"the mask of {name} marks {drawn} pixels, too few to see"
            raise DataError.of(what, found, remedy, f"{what}: {found}: {remedy}")
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
