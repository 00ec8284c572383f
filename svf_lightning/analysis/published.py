"""Tables 5 to 13 of the SVF paper: the strategy and the scores of each row.

Sun et al., Singular Value Fine-tuning, NeurIPS 2022, arXiv:2206.06122. Novel-class mIoU in percent of the
paper's baseline method on PASCAL-5i with ResNet-50, 1 shot, with the training trick.
"""

from typing import NamedTuple

SETTING = "PASCAL-5i, baseline, ResNet-50, 1 shot"


class Row(NamedTuple):
    """A row: the choice in ``conf/finetune/``, what the paper's first columns say, and its numbers."""

    finetune: str
    labels: tuple[str, ...]
    mean: float
    folds: tuple[float, float, float, float] | None = None  # where the reference gives them


class PublishedTable(NamedTuple):
    """A table: what it compares, the heads of its first columns, and its rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


FROZEN = Row("frozen", (), 65.07, (65.60, 70.28, 64.12, 60.27))
SVF_MEAN, SVF_FOLDS = 67.14, (67.42, 71.57, 67.99, 61.57)
SVF = Row("svf", (), SVF_MEAN, SVF_FOLDS)
YES, NO = "✓", ""

TABLES = {
    "table05": PublishedTable(
        "BatchNorm against singular values",
        ("BN", "scale"),
        (
            Row("bn", (YES, NO), 63.12),
            Row("bn_svf", (YES, YES), 64.20),
            Row("svf", (NO, YES), SVF_MEAN, SVF_FOLDS),
        ),
    ),
    "table06": PublishedTable(
        "fine-tuning the convolutions of fewer and fewer stages",
        ("layer1", "layer2", "layer3", "layer4"),
        (
            Row("full", (YES, YES, YES, YES), 60.90, (57.97, 70.51, 61.33, 53.80)),
            Row("part", (NO, YES, YES, YES), 61.15),
            Row("part_layers34", (NO, NO, YES, YES), 61.08),
            Row("part_layer4", (NO, NO, NO, YES), 60.58),
        ),
    ),
    "table07": PublishedTable(
        "fine-tuning convolutions of layers 2 to 4 by kernel size",
        ("3x3", "1x1"),
        (Row("part_3x3", (YES, NO), 61.86), Row("part_1x1", (NO, YES), 61.62)),
    ),
    "table08": PublishedTable(
        "which of U, S and V trains",
        ("U", "S", "V"),
        (
            Row("svf_u", (YES, NO, NO), 61.09),
            Row("svf", (NO, YES, NO), SVF_MEAN, SVF_FOLDS),
            Row("svf_v", (NO, NO, YES), 60.88),
            Row("svf_us", (YES, YES, NO), 61.57),
            Row("svf_sv", (NO, YES, YES), 60.42),
            Row("svf_uv", (YES, NO, YES), 60.02),
            Row("svf_usv", (YES, YES, YES), 61.24),  # its ticks are unreadable; known by its place
        ),
    ),
    "table09": PublishedTable(
        "singular values of which stages",
        ("layer1", "layer2", "layer3", "layer4"),
        (
            Row("svf_layer4", (NO, NO, NO, YES), 66.21, (68.28, 71.04, 65.59, 59.91)),
            Row("svf_layers34", (NO, NO, YES, YES), 67.20, (67.21, 71.88, 68.12, 61.57)),
            Row("svf", (NO, YES, YES, YES), SVF_MEAN, SVF_FOLDS),
            Row("svf_layers1234", (YES, YES, YES, YES), 67.12, (67.06, 71.69, 67.77, 61.94)),
        ),
    ),
    "table10": PublishedTable(
        "what trains in BatchNorm",
        ("weight", "bias"),
        (
            Row("bn_weight", (YES, NO), 62.58),
            Row("bn_bias", (NO, YES), 62.93),
            Row("bn", (YES, YES), 63.12),
        ),
    ),
    "table11": PublishedTable(
        "a scale per output channel or per input",
        ("kernel",),
        (
            Row("channel_scale_output", ("S'W",), 63.52, (60.96, 71.99, 62.54, 58.58)),
            Row("channel_scale", ("W S'",), 64.62, (62.82, 71.69, 62.84, 61.13)),
        ),
    ),
    "table12": PublishedTable(
        "what trains in U S S' V^T",
        ("S", "S'"),
        (
            Row("svf_exp", (NO, YES), 67.10, (67.16, 71.58, 68.59, 61.08)),
            Row("svf_both", (YES, YES), 66.63, (66.42, 71.73, 67.23, 61.12)),
        ),
    ),
    "table13": PublishedTable(
        "other ways to scale a kernel",
        ("kernel",),
        (
            Row("channel_scale_output", ("S'W",), 63.52, (60.96, 71.99, 62.54, 58.58)),
            Row("rotation", ("R S' R^T W",), 43.36, (32.91, 51.93, 51.00, 37.60)),
        ),
    ),
}
