"""The few pieces that several methods share, each with its source."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

PAIRS_AT_ONCE = 2**25  # 128 MB in float32: two pairs of images at 473 pixels, all at 129


def resize(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Resize maps ``(N, C, H, W)`` bilinearly, corners aligned: the rule of PFENet and its heirs."""
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def foreground(masks: Tensor, like: Tensor) -> Tensor:
    """Turn masks with values 0, 1 and 255 into weights 1.0 on the class and 0.0 elsewhere.

    They are in float32, in float64 if ``like`` is: sums over them would go wrong in half precision.
    """
    return (masks == 1).to(torch.promote_types(like.dtype, torch.float32))


def one_batch(query: Tensor, supports: Tensor) -> Tensor:
    """Put queries ``(B, 3, H, W)`` and then their supports ``(B, K, 3, H, W)`` into one batch of ``B + BK``.

    Raises:
        ValueError: If their sizes differ.
    """
    if query.shape[-2:] != supports.shape[-2:]:
        raise ValueError(
            f"query_image is {tuple(query.shape[-2:])} but support_images are {tuple(supports.shape[-2:])}; "
            "they pass the backbone together, so fit them to one size"
        )
    return torch.cat([query, supports.flatten(0, 1)])


def conv_relu(
    in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1, bias: bool = False
) -> list[nn.Module]:
    """A size-preserving convolution and its ReLU, to be unpacked into an ``nn.Sequential``."""
    padding = dilation * (kernel_size // 2)
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=bias),
        nn.ReLU(inplace=True),
    ]


def two_convolutions(channels: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with its ReLU."""
    return nn.Sequential(*conv_relu(channels, channels, 3), *conv_relu(channels, channels, 3))


def classifier(channels: int) -> nn.Sequential:
    """Map features ``(N, C, h, w)`` to logits ``(N, 2, h, w)``."""
    return nn.Sequential(*conv_relu(channels, channels, 3), nn.Dropout2d(0.1), nn.Conv2d(channels, 2, 1))


def check_options(grid: str, prior_stages: Sequence[int], init: str, shot: int = 1) -> None:
    """Check the options that PFENet and its heirs share.

    Raises:
        ValueError: If an option has none of its values, or ``shot`` is below 1.
    """
    if shot < 1:
        raise ValueError(f"shot must be 1 or more, got {shot}")
    if grid not in ("layer2", "layer3"):
        raise ValueError(f"grid must be 'layer2' or 'layer3', got {grid!r}")
    if not prior_stages or not set(prior_stages) <= {2, 3, 4}:
        raise ValueError(f"prior_stages must be some of 2, 3 and 4, got {list(prior_stages)}")
    if init not in ("default", "kaiming"):
        raise ValueError(f"init must be 'default' or 'kaiming', got {init!r}")


def kaiming_fan_in_(*modules: nn.Module) -> None:
    """Start convolutions so that a signal keeps its size on the way forward through their ReLUs.

    Biases start at zero. Torch's own initialisation shrinks it two- to threefold in each.

    Source:
        He et al., Delving Deep into Rectifiers, ICCV 2015.
    """
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def masked_average_pool(features: Tensor, mask: Tensor, eps: float = 5e-4) -> Tensor:
    """Average the features that lie under a mask: one prototype per image.

    An image whose mask is empty gets the zero prototype, which adds no signal to its episode.

    Args:
        features: Shape ``(N, C, H, W)``.
        mask: Weight of each position in ``[0, 1]``, shape ``(N, H, W)``. Remove the ignore
            label first: a 255 left in would count as weight 255.
        eps: Added to the area, which is counted in feature positions.

    Returns:
        Prototypes, shape ``(N, C)``, in the units and the type of ``features``.

    Raises:
        ValueError: If features and mask differ in height or width.

    Source:
        Zhang et al., SG-One, IEEE Trans. Cybernetics 50(9), 2020; ``eps`` as in PFENet's code.

    Example:
        >>> features = torch.tensor([[[[1.0, 5.0], [3.0, 7.0]]]])
        >>> mask = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
        >>> masked_average_pool(features, mask, eps=0)
        tensor([[6.]])
    """
    if features.shape[-2:] != mask.shape[-2:]:
        raise ValueError(
            f"features are {tuple(features.shape[-2:])} but mask is {tuple(mask.shape[-2:])}; "
            "resize the mask to the features first"
        )
    area = mask.sum(dim=(1, 2)) + eps
    pooled = torch.einsum("nchw,nhw->nc", features, mask.to(features.dtype)) / area[:, None]
    return pooled.to(features.dtype)


def prior_mask(query: Tensor, support: Tensor, eps: float = 1e-7) -> Tensor:
    """Tell how much each query position resembles anything in the masked support image.

    The similarity of a query position is its best cosine over all support positions, stretched
    to ``[0, 1]`` within each image. Computed in float32 or better, also under autocast.

    Args:
        query: High-level query features, shape ``(B, C, H, W)``.
        support: High-level support features with the background set to zero, shape ``(BK, C, H', W')``:
            the K supports of a query one after the other.
        eps: Keeps both divisions finite; a support with an empty mask gives a prior of zeros.

    Returns:
        Prior of every support, shape ``(BK, 1, H, W)``, in ``[0, 1]``.

    Source:
        Tian et al., PFENet, TPAMI 2020, section 4.2.
    """
    q, s = query.flatten(2), support.flatten(2)  # (B, C, P), (BK, C, P')
    with torch.autocast(query.device.type, enabled=False):
        if torch.is_grad_enabled() and (q.requires_grad or s.requires_grad):
            similarity = _BestCosine.apply(q, s, eps)  # (BK, P)
        else:
            similarity = _best_cosine(q, s, eps)[0]
        low, high = similarity.amin(dim=1, keepdim=True), similarity.amax(dim=1, keepdim=True)
        prior = (similarity - low) / (high - low + eps)
    return prior.unflatten(1, query.shape[-2:])[:, None]


class _BestCosine(torch.autograd.Function):
    """Best cosine of each query position with any support position, without keeping all the others.

    The gradient goes to the best pair alone, the first one if several are as good, as that of ``max``.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, support: Tensor, eps: float) -> Tensor:
        cosine, index = _best_cosine(query, support, eps)
        ctx.save_for_backward(query, support, cosine, index)
        ctx.eps = eps
        return cosine

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        query, support, cosine, index = ctx.saved_tensors
        of_query, of_support = torch.zeros_like(query, dtype=grad.dtype), torch.empty_like(support)
        for rows in _chunks(query, support):
            episodes = rows // (len(support) // len(query))
            q, s = query[episodes].to(grad.dtype), support[rows].to(grad.dtype)
            places = index[rows, None].expand(-1, q.shape[1], -1)  # (n, C, P)
            best = s.gather(2, places)
            q_norm, s_norm = q.norm(dim=1), best.norm(dim=1)  # (n, P)
            scale = grad[rows] / (q_norm * s_norm + ctx.eps)
            # d cos = (d(q s) - cos d(|q| |s|)) / (|q| |s| + eps); a norm of zero has no direction to grow in
            shrink = scale * cosine[rows]
            to_query = scale[:, None] * best - (shrink * _ratio(s_norm, q_norm))[:, None] * q
            to_best = scale[:, None] * q - (shrink * _ratio(q_norm, s_norm))[:, None] * best
            of_query.index_add_(0, episodes, to_query)
            of_support[rows] = torch.zeros_like(s).scatter_add_(2, places, to_best).to(support.dtype)
        return of_query.to(query.dtype), of_support, None


def _best_cosine(query: Tensor, support: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Best cosine of each query position and where in the support it is, both ``(BK, P)``."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    best = []
    for rows in _chunks(query, support):
        q, s = query[rows // (len(support) // len(query))].to(dtype), support[rows].to(dtype)
        norms = s.norm(dim=1)[:, :, None] * q.norm(dim=1)[:, None, :]
        best.append((s.mT @ q).div_(norms.add_(eps)).max(dim=1))  # over (n, P', P)
    return torch.cat([cosine for cosine, _ in best]), torch.cat([index for _, index in best])


def _chunks(query: Tensor, support: Tensor) -> Sequence[Tensor]:
    """Numbers of the supports whose cosines are computed together."""
    at_once = max(1, PAIRS_AT_ONCE // (query.shape[2] * support.shape[2]))
    return torch.arange(len(support), device=support.device).split(at_once)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """A quotient that is zero where it would divide by zero."""
    return torch.where(below > 0, above / below, 0)


def compare(
    features: Sequence[Tensor],
    masks: Tensor,
    down_query: nn.Module,
    down_supp: nn.Module,
    grid: str = "layer3",
    prior_stages: Sequence[int] = (4,),
) -> tuple[Tensor, Tensor, Tensor]:
    """What B queries see of K supports each: a prototype and prior masks per support, not yet combined.

    Args:
        features: Of stages 2, 3 and 4, each of B queries and then of their BK supports, whose background was
            masked out before stage 4.
        masks: Foreground of the supports in ``[0, 1]``, shape ``(BK, H, W)``.
        down_query: Projects features of stages 3 and 2, concatenated, to ``C`` channels.
        down_supp: Does so for the supports.
        grid: The stage whose resolution ``h, w`` the results have, "layer2" or "layer3".
        prior_stages: Stages whose features give a prior mask each, S in all.

    Returns:
        Query features ``(B, C, h, w)``, prototypes ``(B, K, C)`` and priors ``(B, K, S, h, w)``.

    Source:
        Meta learner of BAM (Lang et al., CVPR 2022), which the baseline of the SVF paper is. The pieces are
        those of PFENet (Tian et al., TPAMI 2020).
    """
    f2, f3, f4 = features
    batch = len(f2) - len(masks)
    shots = len(masks) // batch
    size = (f3 if grid == "layer3" else f2).shape[-2:]
    middle = torch.cat([resize(f3, size), resize(f2, size)], dim=1)
    query = down_query(middle[:batch])
    small = resize(masks[:, None], size)[:, 0]  # soft at the borders
    prototypes = masked_average_pool(down_supp(middle[batch:]), small).unflatten(0, (batch, shots))
    priors = []
    for stage in prior_stages:
        feature = (f2, f3, f4)[stage - 2]
        masked = feature[batch:] * resize(masks[:, None], feature.shape[-2:]).to(feature.dtype)
        priors.append(resize(prior_mask(feature[:batch], masked), size))
    return query, prototypes, torch.cat(priors, dim=1).unflatten(0, (batch, shots)).to(query.dtype)


class ASPP(nn.Module):
    """Look at a feature map at five scales at once: global average, 1x1, and three dilated 3x3.

    The global branch comes first in the output, as in the official state dict.

    Args:
        channels: Input channels and those of every branch; the output has five times as many.
        dilations: Of the three 3x3 branches, in feature positions.

    Source:
        Chen et al., DeepLab, arXiv:1706.05587; layout of BAM's ``ASPP`` (chunbolang/BAM, MIT).
    """

    def __init__(self, channels: int = 256, dilations: tuple[int, int, int] = (6, 12, 18)) -> None:
        super().__init__()
        self.layer6_0 = nn.Sequential(*conv_relu(channels, channels, bias=True))
        self.layer6_1 = nn.Sequential(*conv_relu(channels, channels, bias=True))
        for branch, dilation in enumerate(dilations, start=2):
            conv = nn.Sequential(*conv_relu(channels, channels, 3, dilation, bias=True))
            self.add_module(f"layer6_{branch}", conv)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, 5C, H, W)``."""
        pooled = self.layer6_0(x.mean(dim=(2, 3), keepdim=True)).expand_as(x)
        branches = [self.get_submodule(f"layer6_{i}")(x) for i in range(1, 5)]
        return torch.cat([pooled, *branches], dim=1)


class MetaLearner(NamedTuple):
    """Parts of the meta learner of BAM, which the baseline of the SVF paper is; in the order of use."""

    down_query: nn.Module  # features of stages 3 and 2 to (B, C, h, w)
    down_supp: nn.Module
    init_merge: nn.Module  # query, prototype and priors to C channels
    ASPP_meta: nn.Module
    res1_meta: nn.Module
    res2_meta: nn.Module
    cls_meta: nn.Module  # to logits (B, 2, h, w)


def meta_learner(middle: int, channels: int, priors: int, dropout: float, init: str) -> MetaLearner:
    """Make the parts of a meta learner.

    Args:
        middle: Channels of stages 2 and 3 together.
        channels: Width ``C`` of the head.
        priors: Prior masks per support.
        dropout: Share of channels dropped after the two projections while training.
        init: "default" or "kaiming".

    Source:
        Lang et al., CVPR 2022; the names are those of the official state dict (chunbolang/BAM, MIT).
    """
    parts = MetaLearner(
        down_query=nn.Sequential(*conv_relu(middle, channels), nn.Dropout2d(dropout)),
        down_supp=nn.Sequential(*conv_relu(middle, channels), nn.Dropout2d(dropout)),
        init_merge=nn.Sequential(*conv_relu(2 * channels + priors, channels)),
        ASPP_meta=ASPP(channels),
        res1_meta=nn.Sequential(*conv_relu(5 * channels, channels)),
        res2_meta=two_convolutions(channels),
        cls_meta=classifier(channels),
    )
    if init == "kaiming":
        kaiming_fan_in_(*parts[:-1], parts.cls_meta.get_submodule("0"))
        nn.init.normal_(parts.cls_meta.get_parameter("3.weight"), std=0.01)  # begins undecided
    return parts
