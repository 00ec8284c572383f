"""Resize, augment and normalise an image together with its mask; every resize rule of the package is here.

The field's published numbers come from pictures handled by OpenCV as float32, so its conventions hold:

* bilinear: half-pixel centres, no antialiasing, no rounding of the result to whole grey values;
* nearest: output position ``x`` reads input position ``floor(x * input / output)``;
* a rotation turns about pixel ``(W/2, H/2)``, half a pixel beside the geometric centre.

Images are ``(3, H, W)`` RGB in [0, 255], uint8 or float. Masks are ``(H, W)`` uint8, 0, 1 or 255. A transform
is called with an image, a mask and a generator, and returns the *normalised* float image and its mask.

Source:
    The transforms of PFENet (Tian et al., TPAMI 2020), which BAM, CyCTR, CWT and SVF (Sun et al., NeurIPS
    2022) share. Rewritten from their description. Known differences, all below a pixel and random anyway:
    after the random scale we sample at the exact ratio of the rounded sizes, OpenCV at the unrounded
    factor; OpenCV quantises the coordinates of a rotation to 1/32 pixel, we do not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from svf_lightning.episode import FOREGROUND, IGNORE


def binary_mask(label: Tensor, class_id: int) -> Tensor:
    """The mask of one class: 1 on the class, 255 where the label ignores, 0 on every other class.

    Args:
        label: Class ids and 255, shape ``(H, W)``, integer.
        class_id: The class to keep, counted from 1.

    Returns:
        Mask of shape ``(H, W)``, uint8.

    Example:
        >>> binary_mask(torch.tensor([[0, 3, 7, 255]]), class_id=3)
        tensor([[  0,   1,   0, 255]], dtype=torch.uint8)
    """
    mask = (label == class_id).to(torch.uint8)
    return mask.masked_fill_(label == IGNORE, IGNORE)


def normalize(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """An image in [0, 255] as the backbone wants it: ``(image / 255 - mean) / std`` per channel.

    Args:
        image: Shape ``(..., 3, H, W)``, uint8 or float in [0, 255].
        mean: Mean of each channel, for images in [0, 1].
        std: Standard deviation of each channel, likewise.

    Returns:
        Float image of the same shape.

    Example:
        >>> grey = torch.full((3, 1, 1), 255)
        >>> normalize(grey, mean=(0.5, 0.5, 0.0), std=(0.5, 0.25, 1.0)).flatten()
        tensor([1., 2., 1.])
    """
    return (image - 255 * _per_channel(mean)) / (255 * _per_channel(std))


def resize_pair(image: Tensor, label: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Image and label at another size: bilinear without antialiasing, and nearest.

    With ``height == width`` this is the squashing resize of HSNet (400) and PANet (417).

    Args:
        image: Shape ``(3, H, W)`` in [0, 255].
        label: Shape ``(H, W)``.
        height: Rows of the result.
        width: Columns of the result.

    Returns:
        Float image ``(3, height, width)``, not rounded, and label ``(height, width)`` in its own dtype.
    """
    return _resize_bilinear(image.float(), height, width), _resize_nearest(label, height, width)


def letterbox_size(height: int, width: int, size: int, multiple: int = 8) -> tuple[int, int]:
    """Height and width of the picture inside a letterbox of ``size``; the rest of the canvas is padding.

    The longer side becomes ``size`` and the other follows, cut to an integer; then both are cut to a multiple
    of 8, the longer one too. So a picture never reaches the last column of a canvas of 473.

    The evaluation of the published protocol enlarges as if that cut had not been made. So truth and
    prediction lie apart, the more so the narrower the picture: by 9% of the width for 227x663 at 257 pixels.
    ``multiple=1`` leaves the cut out, and they meet.

    Args:
        height: Rows of the original image.
        width: Columns of the original image.
        size: Side of the square canvas, at least 8.
        multiple: What both sides are cut to a multiple of.

    Example:
        >>> letterbox_size(375, 500, size=473)
        (352, 472)
        >>> letterbox_size(375, 500, size=473, multiple=1)
        (354, 473)
    """
    longest = max(height, width)
    ratio = size / longest
    sides = [size if side == longest else int(side * ratio) for side in (height, width)]
    # An image 60 times as long as wide would be cut to nothing; the reference crashes there.
    rows, columns = (max(8, side // multiple * multiple) for side in sides)
    return rows, columns


def letterbox(
    image: Tensor, label: Tensor, size: int, *, pad: Sequence[float] = (0.0, 0.0, 0.0), multiple: int = 8
) -> tuple[Tensor, Tensor]:
    """Image and label resized, aspect kept, into the top left of a square canvas; not normalised yet.

    Args:
        image: Shape ``(3, H, W)`` in [0, 255].
        label: Shape ``(H, W)``.
        size: Side of the canvas, at least 8.
        pad: Colour of the padding in [0, 255]. Black, unlike the padding in training, is what nearly all
            published evaluations use.
        multiple: See `letterbox_size`.

    Returns:
        Float image ``(3, size, size)`` and label ``(size, size)``, the padding of the label being 255.

    Source:
        Validation transform ``Resize`` of PFENet, BAM, CyCTR and SVF. Their ``test_Resize`` is the same for
        images longer than ``size``. CWT's ``Resize`` has the option that is ``pad`` here; the padding mask
        that CyCTR adds is ``label == 255``.
    """
    rows, columns = letterbox_size(image.shape[-2], image.shape[-1], size, multiple)
    image, label = resize_pair(image, label, rows, columns)
    canvas = _per_channel(pad).repeat(1, size, size)
    canvas[:, :rows, :columns] = image
    label_canvas = label.new_full((size, size), IGNORE)
    label_canvas[:rows, :columns] = label
    return canvas, label_canvas


@dataclass(frozen=True)
class Letterbox:
    """The transform of validation and test: letterbox, then normalise.

    Args:
        size: Side of the square canvas in pixels, at least 8.
        mean: Mean of each channel, for images in [0, 1].
        std: Standard deviation of each channel, likewise.
        pad: ``"black"`` as in nearly all published code, or ``"mean"``, which is 0 after normalisation.
        multiple: See `letterbox_size`; 8 as published, or 1.

    Raises:
        ValueError: If ``size`` is below 8, ``pad`` is neither of the two, or ``multiple`` is below 1.
    """

    size: int
    mean: Sequence[float]
    std: Sequence[float]
    pad: Literal["black", "mean"] = "black"
    multiple: int = 8

    def __post_init__(self) -> None:
        if self.size < 8:
            raise ValueError(f"size={self.size} is too small for a letterbox; use at least 8 pixels")
        if self.pad not in ("black", "mean"):
            raise ValueError(f"pad={self.pad!r} is unknown; use 'black' or 'mean'")
        if type(self.multiple) is not int or self.multiple < 1:
            raise ValueError(f"multiple={self.multiple!r} is no number of pixels; use 8, or 1 for no cut")

    def __call__(
        self, image: Tensor, mask: Tensor, generator: np.random.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Transform one image ``(3, H, W)`` and its mask ``(H, W)``; nothing is drawn from ``generator``."""
        colour = [255 * value if self.pad == "mean" else 0.0 for value in self.mean]
        image, mask = letterbox(image, mask, self.size, pad=colour, multiple=self.multiple)
        return normalize(image, self.mean, self.std), mask


@dataclass(frozen=True)
class Augment:
    """The random transform of training: scale, rotate, blur, flip, crop, in this order.

    The image is normalised first. All later steps are averages whose weights add up to one, so the order
    makes no difference to the picture, and from there on 0 *is* the mean colour that borders and padding get.

    Args:
        size: Side of the square crop in pixels.
        mean: Mean of each channel, for images in [0, 1].
        std: Standard deviation of each channel, likewise.
        scale: Smallest and largest factor of the isotropic scale.
        rotate: Largest angle in degrees, to either side.
        rotate_p: Probability of a rotation.
        blur_p: Probability of a blur: 5x5, binomial weights.
        flip_p: Probability of a horizontal flip.
        crop_foreground: Share of the foreground that a crop should keep, in [0, 1]; it is drawn again up to
            31 times, and the last draw is taken as it is.

    Raises:
        ValueError: If a number is outside its range.

    Source:
        PFENet's training transform with its values for PASCAL-5i; COCO-20i takes ``scale=(0.8, 1.25)``.
    """

    size: int
    mean: Sequence[float]
    std: Sequence[float]
    scale: Sequence[float] = (0.9, 1.1)
    rotate: float = 10.0
    rotate_p: float = 0.5
    blur_p: float = 0.5
    flip_p: float = 0.5
    crop_foreground: float = 0.85

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size} is not a crop; use at least 1 pixel")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale={tuple(self.scale)} is not a range; use two factors, 0 < low <= high")
        for name in ("rotate_p", "blur_p", "flip_p", "crop_foreground"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not in [0, 1]")

    def __call__(self, image: Tensor, mask: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Transform one image and its mask; the result depends on the arguments alone.

        Args:
            image: Shape ``(3, H, W)`` in [0, 255].
            mask: Shape ``(H, W)``, uint8: 0, 1 or 255. The crop looks for its ones.
            generator: Source of every draw; its state moves on.

        Returns:
            Normalised float image ``(3, size, size)`` and mask ``(size, size)``.
        """
        image = normalize(image, self.mean, self.std)
        factor = generator.uniform(self.scale[0], self.scale[1])
        height, width = (max(1, round(side * factor)) for side in image.shape[-2:])
        image, mask = resize_pair(image, mask, height, width)
        if generator.random() < self.rotate_p:
            image, mask = _rotate(image, mask, generator.uniform(-self.rotate, self.rotate))
        if generator.random() < self.blur_p:
            image = _blur(image)
        if generator.random() < self.flip_p:
            image, mask = image.flip(-1), mask.flip(-1)
        return _crop(image, mask, self.size, self.crop_foreground, generator)


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None]  # (3, 1, 1)


def _resize_bilinear(image: Tensor, height: int, width: int) -> Tensor:
    # F.interpolate gives the same, but its last bits change with the number of threads, and with them a
    # training run would change with the number of workers.
    x = (torch.arange(width) + 0.5) * (image.shape[-1] / width) - 0.5
    y = (torch.arange(height) + 0.5) * (image.shape[-2] / height) - 0.5
    grid = _grid(x, y[:, None], *image.shape[-2:])
    return _sample(image, grid, mode="bilinear", padding_mode="border")


def _resize_nearest(label: Tensor, height: int, width: int) -> Tensor:
    # Positions in float64, as OpenCV has them. In float32, as in F.interpolate, some fall on the other side
    # of an integer: at 375x500 -> 352x472 hundreds of labels would come from a neighbour.
    for dim, length in ((0, height), (1, width)):
        step = 1 / (length / label.shape[dim])
        positions = (torch.arange(length, dtype=torch.float64) * step).long()
        label = label.index_select(dim, positions.clamp_max(label.shape[dim] - 1))
    return label


def _rotate(image: Tensor, mask: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """Turn counter-clockwise on the same canvas; what comes from outside is 0 in the image, 255 in the mask.

    torchvision's rotate gives the same result in four times the time.
    """
    height, width = mask.shape
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    across = torch.arange(width) - width / 2
    down = torch.arange(height)[:, None] - height / 2
    x = cosine * across - sine * down + width / 2  # (H, W), where each pixel comes from
    y = sine * across + cosine * down + height / 2
    grid = _grid(x, y, height, width)
    # Outside is always zero, so 255 is made the zero of the mask meanwhile.
    shifted = _sample(mask[None].float() - IGNORE, grid, mode="nearest", padding_mode="zeros")
    image = _sample(image, grid, mode="bilinear", padding_mode="zeros")
    return image, (shifted[0] + IGNORE).to(mask.dtype)


def _grid(x: Tensor, y: Tensor, height: int, width: int) -> Tensor:
    """Columns ``x`` and rows ``y`` of an image in pixels, which broadcast to the new size, for `_sample`."""
    grid = torch.empty(*torch.broadcast_shapes(x.shape, y.shape), 2)
    # grid_sample measures from the outer edge of the first pixel, -1, to that of the last one, 1
    grid[..., 0] = (2 * x + 1) / width - 1
    grid[..., 1] = (2 * y + 1) / height - 1
    return grid


def _sample(image: Tensor, grid: Tensor, *, mode: str, padding_mode: str) -> Tensor:
    """Read ``image (C, H, W)`` at the positions of ``grid``, shape ``(H', W', 2)``."""
    return F.grid_sample(image[None], grid[None], mode, padding_mode, align_corners=False)[0]


def _blur(image: Tensor) -> Tensor:
    """Average with the weights (1, 4, 6, 4, 1) / 16 along both axes, reflecting at the border.

    This is what OpenCV's GaussianBlur does for a 5x5 kernel without a sigma: the table of small kernels,
    which is near to, but not, a Gaussian of sigma 1.1.
    """
    height, width = image.shape[-2:]
    if min(height, width) < 3:
        return image  # too thin to reflect two pixels
    image = F.pad(image, (2, 2, 2, 2), mode="reflect")
    for dim, length in ((-2, height), (-1, width)):
        for border in (3, 2, 1, 0):  # four sums of neighbours give 1 4 6 4 1, faster than a convolution
            image = image.narrow(dim, 0, length + border) + image.narrow(dim, 1, length + border)
    return image / 256


def _crop(
    image: Tensor, mask: Tensor, size: int, share: float, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A random square, drawn again up to 31 times while it keeps less than ``share`` of the foreground."""
    height, width = mask.shape
    # Padding to at least the crop's size, the smaller half before, and cropping become one copy: offsets are
    # counted from the corner of the padded image.
    top, left = max(0, size - height) // 2, max(0, size - width) // 2
    foreground = mask == FOREGROUND
    wanted = share * foreground.sum()
    for _ in range(32):
        y = int(generator.integers(max(height, size) - size + 1))
        x = int(generator.integers(max(width, size) - size + 1))
        if foreground[y : y + size, x : x + size].sum() >= wanted:
            break
    crop = image.new_zeros(image.shape[0], size, size)
    mask_crop = mask.new_full((size, size), IGNORE)
    rows, columns = min(height, size), min(width, size)
    crop[:, top : top + rows, left : left + columns] = image[:, y : y + rows, x : x + columns]
    mask_crop[top : top + rows, left : left + columns] = mask[y : y + rows, x : x + columns]
    return crop, mask_crop
