"""mIoU and FB-IoU: intersections and unions are summed over all episodes, then divided once."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix

from svf_lightning.episode import IGNORE


def confusion_matrix(prediction: Tensor, target: Tensor, labels: int = 2) -> Tensor:
    """Count the pixels of every pair of a true and a predicted label; the sums that all scores are made of.

    Its diagonal is the intersections, its rows sum to the areas of the target, its columns to those of the
    prediction. The numbers of other repositories come from it as well, where they differ from ours:

    - CaNet and PMMs know no ignore label: their 255 is background. Replace it in the target beforehand.
    - PANet leaves out what is predicted in an episode whose target shows no foreground. No episode of the
      protocol is like that at the original resolution, since its class is drawn from what the query shows.
    - MiningFSS averages over all classes that occur, which are those under test.

    Args:
        prediction: Predicted labels below ``labels``, any shape.
        target: True labels below ``labels``, or 255; pixels with 255 count nowhere. Same shape.
        labels: Number of labels, background included.

    Returns:
        Pixels, shape ``(labels, labels)``, long; rows are true labels, columns predicted ones.

    Example:
        >>> confusion_matrix(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 255]))
        tensor([[1, 1],
                [0, 1]])
    """
    return multiclass_confusion_matrix(
        prediction, target, labels, ignore_index=IGNORE, validate_args=False
    )  # unvalidated: a check of every pixel would cost more than the count


def intersection_and_union(prediction: Tensor, target: Tensor, labels: int = 2) -> tuple[Tensor, Tensor]:
    """Count the pixels of background and foreground that agree, and that either side claims.

    Args:
        prediction: Predicted labels 0 or 1, any shape.
        target: True labels 0, 1, or 255; pixels with 255 count nowhere. Same shape.
        labels: Number of labels, where there are more than two.

    Returns:
        Intersection and union, each ``(labels,)`` long, background first.

    Source:
        ``intersectionAndUnion`` of PFENet (dvlab-research/PFENet), which BAM, SVF and CyCTR share.

    Example:
        >>> prediction = torch.tensor([0, 1, 1, 1])
        >>> target = torch.tensor([0, 0, 1, 255])
        >>> intersection_and_union(prediction, target)
        (tensor([1, 1]), tensor([2, 2]))
    """
    confusion = confusion_matrix(prediction, target, labels)
    intersection = confusion.diagonal()
    return intersection, confusion.sum(dim=0) + confusion.sum(dim=1) - intersection


class FewShotIoU(Metric):
    """Class mIoU and FB-IoU over all episodes seen.

    Intersections and unions are summed over episodes, per class, and divided once, so the result
    does not depend on batch size, order or number of processes. (torchmetrics' ``MeanIoU``
    averages scores of single images, which is another number.)

    - class IoU: foreground intersection over union, over the episodes of one class; in [0, 1].
    - mIoU: mean of the class IoUs over ``classes``, the novel classes of the fold; a class
      without a single episode counts as 0, as in the official code.
    - FB-IoU: mean of background and foreground IoU, over all episodes whatever their class.

    Args:
        classes: The classes under test, as ids of the data set.

    Source:
        Protocol of Shaban et al., OSLSM, BMVC 2017 (mIoU) and Rakelly et al., 2018 (FB-IoU).
    """

    full_state_update = False

    def __init__(self, classes: Iterable[int]) -> None:
        super().__init__()
        self.classes = tuple(classes)
        shape = (len(self.classes), 2)
        self.intersection: Tensor
        self.union: Tensor
        self.episodes: Tensor
        self.add_state("intersection", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("union", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("episodes", torch.zeros(shape[0], dtype=torch.long), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor, class_id: int) -> None:
        """Add one episode.

        Args:
            prediction: Predicted labels 0 or 1, shape ``(H, W)``.
            target: True labels 0, 1 or 255, same shape.
            class_id: The episode's class.

        Raises:
            ValueError: If the class is not one of ``classes``, or the shapes differ.
        """
        if class_id not in self.classes:
            raise ValueError(f"class {class_id} is not under test; the classes are {self.classes}")
        if prediction.shape != target.shape:
            raise ValueError(f"prediction is {tuple(prediction.shape)} but target is {tuple(target.shape)}")
        row = self.classes.index(class_id)
        intersection, union = intersection_and_union(prediction, target)
        self.intersection[row] += intersection
        self.union[row] += union
        self.episodes[row] += 1

    def class_iou(self) -> Tensor:
        """Foreground IoU of each class, shape ``(len(classes),)``, in [0, 1]; 0 without episodes."""
        return self.intersection[:, 1].double() / self.union[:, 1].clamp_min(1)

    def compute(self) -> dict[str, Tensor]:
        """Return ``miou`` and ``fb_iou``, scalars, and ``class_iou`` ``(len(classes),)``, all in [0, 1].

        And ``episodes``, how many were scored.

        torchmetrics makes a scalar of ``class_iou`` where there is a single class.
        """
        both = self.intersection.sum(dim=0).double() / self.union.sum(dim=0).clamp_min(1)
        class_iou = self.class_iou()
        scores = {"miou": class_iou.mean(), "fb_iou": both.mean(), "class_iou": class_iou}
        return {**scores, "episodes": self.episodes.sum()}
