"""HSNet: squeeze the 4D correlations of many feature layers into a mask of the query.

Paper: Min et al., Hypercorrelation Squeeze for Few-Shot Segmentation, ICCV 2021 (arXiv:2104.01538).
Original code: juhongm999/hsnet. Written from a description of its behaviour, nothing is copied; module
names of the learner are the official ones, so that checkpoints carry over.

Where we knowingly differ from the original code:

- It remembers which support positions a strided 4D convolution keeps from the first image it meets, and
  upsamples by the width alone. Here every forward looks anew: any size at any time, square or not.
- Support maps of three levels that do not shrink to one size are resized to each other. With ResNets
  they always do; the original fails or broadcasts.
- Features carry gradients, so that SVF and other strategies can train the backbone. In training with
  several shots the logits are averaged over them; the original trains on one shot only.
- A backbone without the bottleneck blocks of ResNet or the plain chain of VGG gives the outputs of its
  blocks, or of its stages where it does not show its blocks.
- The vote over shots is taken at the network's resolution; the original can resize logits first.
- The original trains on void pixels as background: ``losses.cross_entropy(void_is_background=True)``.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svf_lightning.backbones.backbone import Backbone
from svf_lightning.episode import Episode, Prediction
from svf_lightning.models.blocks import conv_relu, foreground, one_batch, resize

BOTTLENECK = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "relu", "downsample")


class HSNet(nn.Module):
    """Compare query and support position by position at many layers, and learn from that alone.

    The head never sees a feature, only cosine similarities. The official backbones are a ResNet with
    plain stem and ``dilation="none"``, and a VGG-16 with ``batch_norm=False, ceil_mode=False``. Dilated
    ones work, but their three levels are of one resolution ``h x w``, and so are three pyramids of
    ``(h w)^2`` positions: a ResNet-50 at 473 pixels then needs 0.7 GB per pair for these alone.

    Args:
        backbone: Five stages; stages 2, 3 and 4 give a level of features each (VGG: stages 3 and 4,
            and the pooled stage 4).
        shot: Supports per episode in training. No part of the network depends on it; see ``forward``.
        channels: Width of the head, a multiple of 8.

    Raises:
        ValueError: If ``shot`` is below 1 or ``channels`` is no multiple of 8.

    Source:
        Min et al., ICCV 2021, section 4.
    """

    any_shot = True  # whether numbers of shots other than ``shot`` fit

    def __init__(self, backbone: Backbone, shot: int = 1, *, channels: int = 128) -> None:
        super().__init__()
        if shot < 1:
            raise ValueError(f"shot must be 1 or more, got {shot}")
        if channels < 8 or channels % 8:
            raise ValueError(f"channels must be a multiple of 8, got {channels}")
        self.backbone = backbone
        self.shot = shot
        self.hpn_learner = HPNLearner(count_features(backbone), channels)

    def forward(self, episode: Episode) -> Prediction:
        """Predict the query's mask.

        Every support is matched alone. In training the logits are the mean over shots. Otherwise one shot
        gives its logits, and several shots vote, see :func:`vote`: no gradient passes a vote.

        Args:
            episode: With any number of supports each.

        Returns:
            Logits ``(B, 2, H, W)`` at the query's size; nothing auxiliary.
        """
        batch, shots = episode.support_masks.shape[:2]
        masks = foreground(episode.support_masks.flatten(0, 1), episode.query_image)  # (BK, H, W)
        images = one_batch(episode.query_image, episode.support_images)
        levels = hyperfeatures(self.backbone, images)  # shallow to deep
        correlations = (
            correlate([f[:batch] for f in level], [f[batch:] for f in level], masks)
            for level in reversed(levels)
        )  # made one after the other, as the learner asks for them
        logits = self.hpn_learner(correlations)  # (BK, 2, ~H / 4, ~W / 4)
        logits = resize(logits, episode.query_image.shape[-2:]).unflatten(0, (batch, shots))
        if self.training or shots == 1:
            return Prediction(logits.mean(dim=1))
        return Prediction(vote(logits))


def vote(logits: Tensor) -> Tensor:
    """Let the shots vote, each with its own mask.

    A pixel is foreground if it has at least half as many votes as the pixel with the most. So with up
    to three shots one vote may do, and with no vote anywhere all is background.

    Args:
        logits: Of every shot, shape ``(B, K, 2, H, W)``.

    Returns:
        Logits ``(B, 2, H, W)`` whose larger one follows that rule: zero for the background; for the
        foreground the share of votes, in ``[0, 1]``, over a threshold just below a half.

    Source:
        Min et al., ICCV 2021, section 4.4; the official code divides by the most votes, not by K.

    Example:
        >>> masks = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]])
        >>> logits = torch.stack([1 - masks, masks], dim=1)[None, :, :, None]  # (B=1, K=4, 2, 1, 4)
        >>> vote(logits).argmax(dim=1).flatten().tolist()
        [1, 1, 0, 0]
    """
    shots = logits.shape[1]
    votes = logits.argmax(dim=2).sum(dim=1)  # (B, H, W)
    share = votes / votes.amax(dim=(1, 2), keepdim=True).clamp_min(1)
    # Shares are fractions of at most K votes: none lies between this and a half.
    threshold = 0.5 - 1 / (4 * shots)
    return torch.stack([torch.zeros_like(share), share - threshold], dim=1)


def hyperfeatures(backbone: Backbone, images: Tensor) -> list[list[Tensor]]:
    """Compute the features of three levels, several layers each (section 4.1).

    ResNet: each bottleneck's output before its last ReLU. VGG: the input of each ReLU of stages 3 and 4,
    and the pooled stage 4. Elsewhere the output of each block. All may be negative, save VGG's last.

    Args:
        backbone: Its ``scale`` does not matter, since features are only compared by their cosine.
        images: Normalised images, shape ``(N, 3, H, W)``.

    Returns:
        Three lists, shallow to deep, of features ``(N, C, h, w)``; one ``h x w`` in each list.

    Raises:
        ValueError: If the images are too small to have a third level.
    """
    if _has_no_stride_left(backbone) and not _last_pool(backbone).ceil_mode:
        least = 2 * backbone.strides[4]  # of which the last pool leaves one position
        if min(images.shape[-2:]) < least:
            raise ValueError(
                f"images are {tuple(images.shape[-2:])}, but HSNet's third level on a VGG needs "
                f"{least} pixels or more on each side; take larger ones"
            )
    state = backbone.layer1(backbone.layer0(images))
    levels = []
    for stage in (backbone.layer2, backbone.layer3, backbone.layer4):
        features, state = _run(stage, state)
        # In one size: a block may stand before the stage's stride, as in timm's GhostNet.
        levels.append([resize(feature, features[-1].shape[-2:]) for feature in features])
    if _has_no_stride_left(backbone):
        levels.append([F.max_pool2d(state, 2, 2, ceil_mode=_last_pool(backbone).ceil_mode)])
    return levels[-3:]


def count_features(backbone: Backbone) -> list[int]:
    """How many layers :func:`hyperfeatures` gives per level, shallow to deep; ``[4, 6, 3]`` for ResNet-50."""
    stages = (backbone.layer2, backbone.layer3, backbone.layer4)
    relus = [sum(isinstance(step, nn.ReLU) for step in _steps(stage)) for stage in stages]
    counts = [len(_blocks(stage)) or count or 1 for stage, count in zip(stages, relus, strict=True)]
    return [*counts[1:], 1] if _has_no_stride_left(backbone) else counts


def correlate(query: Sequence[Tensor], support: Sequence[Tensor], masks: Tensor) -> Tensor:
    """Correlate the layers of one level: cosine of every query with every support position (section 4.1).

    Args:
        query: L features, shapes ``(B, C, h, w)``.
        support: L features of the same layers, shapes ``(BK, C, h', w')``.
        masks: Foreground of the supports, shape ``(BK, H, W)``.

    Returns:
        Cosines clipped to ``[0, 1]``, shape ``(BK, L, h, w, h', w')``.
    """
    small = resize(masks[:, None], support[0].shape[-2:]).to(support[0].dtype)  # soft at the borders
    layers = []
    for q, s in zip(query, support, strict=True):
        q, s = (f / (f.norm(dim=1, keepdim=True) + 1e-5) for f in (q, s * small))
        q = q.repeat_interleave(len(s) // len(q), dim=0)
        layers.append(torch.einsum("nchw,ncij->nhwij", q, s).relu_())
    # Stacked behind the query's positions: the convolution over the support's then reads it without a copy.
    return torch.stack(layers, dim=3).permute(0, 3, 1, 2, 4, 5)


class CenterPivotConv4d(nn.Module):
    """A 4D convolution of which only the kernel entries with a centred half are kept (section 4.2).

    What is left is the sum of two 2D convolutions: one over the query's positions for every support
    position that the stride keeps, one over the support's positions for every query position. Both have
    a bias.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Odd, in all four dimensions.
        stride: In the two support dimensions; the query's keep their size.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding)
        self.conv2 = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, I, h, w, h', w')`` to ``(N, O, h, w, ceil(h' / stride), ceil(w' / stride))``."""
        kept = x[..., :: self.stride, :: self.stride].permute(0, 4, 5, 1, 2, 3)  # (N, h'', w'', I, h, w)
        over_query = self.conv1(kept.flatten(0, 2)).unflatten(0, kept.shape[:3])
        all_pairs = x.permute(0, 2, 3, 1, 4, 5)  # (N, h, w, I, h', w')
        over_support = self.conv2(all_pairs.flatten(0, 2)).unflatten(0, all_pairs.shape[:3])
        return over_support.permute(0, 3, 1, 2, 4, 5) + over_query.permute(0, 3, 4, 5, 1, 2)


class HPNLearner(nn.Module):
    """Squeeze a pyramid of hypercorrelations into a map of two logits (sections 4.2 and 4.3).

    Args:
        layers: How many layers each level correlates, shallow to deep.
        width: Channels of a squeezed correlation, a multiple of 8; 128 in the paper.
    """

    def __init__(self, layers: Sequence[int], width: int = 128) -> None:
        super().__init__()
        shallow, middle, deep = layers
        growing = (max(4, width // 32 * 4), width // 2, width)  # 16, 64, 128; GroupNorm divides by 4
        self.encoder_layer4 = _squeezing_block(deep, growing, (3, 3, 3), (2, 2, 2))
        self.encoder_layer3 = _squeezing_block(middle, growing, (5, 3, 3), (4, 2, 2))
        self.encoder_layer2 = _squeezing_block(shallow, growing, (5, 5, 3), (4, 4, 2))
        self.encoder_layer4to3 = _squeezing_block(width, (width,) * 3, (3, 3, 3), (1, 1, 1))
        self.encoder_layer3to2 = _squeezing_block(width, (width,) * 3, (3, 3, 3), (1, 1, 1))
        self.decoder1 = nn.Sequential(
            *conv_relu(width, width, 3, bias=True), *conv_relu(width, width // 2, 3, bias=True)
        )
        self.decoder2 = nn.Sequential(
            *conv_relu(width // 2, width // 2, 3, bias=True), nn.Conv2d(width // 2, 2, 3, padding=1)
        )

    def forward(self, pyramid: Iterable[Tensor]) -> Tensor:
        """Squeeze a pyramid of any sizes.

        Args:
            pyramid: Three correlations ``(N, L, h, w, h', w')``, deep to shallow; may be lazy, since
                each is encoded before the next is asked for.

        Returns:
            Logits, shape ``(N, 2, 2h, 2w)`` for the shallow level's ``h x w``.
        """
        encoders = (self.encoder_layer4, self.encoder_layer3, self.encoder_layer2)
        deep, middle, shallow = (
            encoder(level) for encoder, level in zip(encoders, pyramid, strict=True)
        )  # (N, C, h, w, ~1 / 32 of the image, likewise)

        mixed = self.encoder_layer4to3(_resize_4d(deep, middle.shape[2:]) + middle)
        mixed = self.encoder_layer3to2(_resize_4d(mixed, shallow.shape[2:]) + shallow)

        x = self.decoder1(mixed.mean(dim=(4, 5)))  # (N, C / 2, h, w)
        return self.decoder2(resize(x, (2 * x.shape[2], 2 * x.shape[3])))


def _squeezing_block(
    in_channels: int, channels: Sequence[int], kernels: Sequence[int], strides: Sequence[int]
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for out_channels, kernel, stride in zip(channels, kernels, strides, strict=True):
        layers += [
            CenterPivotConv4d(in_channels, out_channels, kernel, stride),
            nn.GroupNorm(4, out_channels),
            nn.ReLU(inplace=True),
        ]
        in_channels = out_channels
    return nn.Sequential(*layers)


def _resize_4d(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize ``(N, C, h, w, h', w')`` to four given sizes, bilinearly for query and support in turn."""
    query, support = (size[0], size[1]), (size[2], size[3])
    if x.shape[2:4] != query:
        pairs = x.permute(0, 4, 5, 1, 2, 3)  # (N, h', w', C, h, w)
        x = resize(pairs.flatten(0, 2), query).unflatten(0, pairs.shape[:3]).permute(0, 3, 4, 5, 1, 2)
    if x.shape[4:] != support:
        pairs = x.permute(0, 2, 3, 1, 4, 5)  # (N, h, w, C, h', w')
        x = resize(pairs.flatten(0, 2), support).unflatten(0, pairs.shape[:3]).permute(0, 3, 1, 2, 4, 5)
    return x


def _run(stage: nn.Module, state: Tensor) -> tuple[list[Tensor], Tensor]:
    """Run a stage; return its features and its output, which is what the next stage gets."""
    blocks = _blocks(stage)
    features = []
    for step in blocks or _steps(stage):
        if _is_bottleneck(step):
            features.append(_before_last_relu(step, state))
            state = F.relu(features[-1])
        elif isinstance(step, nn.ReLU):
            features.append(state)
            state = F.relu(state)  # not the module, which may work in place
        else:
            state = step(state)
            if blocks:
                features.append(_map(state))
    return features or [_map(state)], state


def _map(state: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The map in a stage's output; see ``Backbone``."""
    return state if isinstance(state, Tensor) else state[0]


def _before_last_relu(block: nn.Module, x: Tensor) -> Tensor:
    """A bottleneck's sum of branch and shortcut, driven by attribute so that its layers may be factored."""
    conv1, bn1, conv2, bn2, conv3, bn3, relu, downsample = (getattr(block, name) for name in BOTTLENECK)
    shortcut = x if downsample is None else downsample(x)
    return bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut


def _is_bottleneck(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in BOTTLENECK)


def _steps(stage: nn.Module) -> list[nn.Module]:
    """What a stage runs one after the other, plain Sequentials within it opened."""
    if type(stage) is not nn.Sequential:  # a subclass may do otherwise
        return [stage]
    return [step for child in stage for step in _steps(child)]


def _blocks(stage: nn.Module) -> list[nn.Module]:
    """The steps of a stage if all are blocks, that is have layers of their own; else nothing."""
    steps = _steps(stage)
    return steps if all(any(step.children()) for step in steps) else []


def _has_no_stride_left(backbone: Backbone) -> bool:
    """Whether this is a VGG whose last pool was left out, which is the third level here."""
    return backbone.strides[4] == backbone.strides[3] and not _blocks(backbone.layer4)


def _last_pool(backbone: Backbone) -> nn.MaxPool2d:
    return [step for step in _steps(backbone.layer3) if isinstance(step, nn.MaxPool2d)][-1]
