"""One convolution or linear layer held as its singular value decomposition."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svf_lightning.svf.convolution import (
    CONVOLVE,
    TRANSPOSE,
    CorrectedConvolution,
    FactoredConvolution,
    convolve,
    dilation_of_ones,
)
from svf_lightning.svf.decompose import TOLERANCE, decompose, leading, rebuild

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
# timm's convolutions that pad by the size of the input, as TensorFlow does. By name, because timm is not
# needed here; their forward is otherwise the plain one.
_PAD_BY_INPUT_SIZE = ("Conv2dSame", "Conv2dSameExport")
_CONVOLUTION_ARGUMENTS = (
    "in_channels out_channels kernel_size stride dilation padding padding_mode output_padding"
)


class SVFLayer(nn.Module):
    """A convolution or linear layer held as its singular value decomposition; only ``s`` is meant to train.

    With gradients wanted for ``s`` it runs as two convolutions, whatever ``training`` says; otherwise as
    the one plain convolution it stands for, whose kernel is rebuilt when a factor has changed. A grouped
    layer has one decomposition per group: ``u`` is then the block-diagonal matrix without its zeros, in
    the layout of a grouped 1x1 kernel, and ``s`` is sorted within each group. A transposed convolution
    has the factors of the convolution that it transposes: in all shapes here ``O`` and ``I`` change places.

    Attributes:
        s: Singular values, shape ``(R,)``, descending and not negative until they train; no sign or order
            is enforced afterwards. Full rank is ``groups * min(O / groups, I / groups * kernel positions)``.
        u: Left singular vectors, shape ``(O, R / groups)``.
        vh: Right singular vectors, shape ``(R, I / groups * kernel positions)``.
        a: None, or logarithms of a factor on ``s``, shape ``(R,)``; :func:`prepare` puts them there.
        rest: What the factors leave of the kernel, in its shape, and frozen; None at full rank.
        bias: The layer's own bias or None; shared with the original layer, not copied.

    Args:
        plain: ``Conv1d``, ``Conv2d``, ``Conv3d``, their transposed kinds, ``Linear``, or a subclass that
            computes the same thing. It is left as it was.
        factors: ``(u, s, vh)`` to use instead of decomposing ``plain.weight``; see :func:`from_factors`.
        rank: How many values train, per group; the largest ones. None: all.

    Raises:
        ValueError: If the layer is of a kind that has no such factors (a weight that is itself computed),
            if its weight holds NaN or infinity, if the factors do not give the weight back, or if ``rank``
            is above the layer's. Where a group has fewer values, as in a depthwise convolution, all train.
    """

    s: Tensor
    u: Tensor
    vh: Tensor
    a: Tensor | None
    rest: Tensor | None
    bias: Tensor | None
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Any  # numbers, or the string "same" or "valid"
    padding_mode: str
    _shell: Any

    def __init__(
        self,
        plain: nn.Module,
        factors: tuple[Tensor, Tensor, Tensor] | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        weight = _weight_of(plain)
        convolution = isinstance(plain, _CONVOLUTIONS)
        self.groups: int = plain.groups if convolution else 1  # type: ignore[assignment]
        self.kernel_shape = tuple(weight.shape)  # (O, I / groups, *kernel)
        self.transposed = isinstance(plain, _TRANSPOSED)
        u, s, vh = decompose(weight, self.groups) if factors is None else factors
        rest = None
        if rank is not None:
            u, s, vh, rest = leading(u, s, vh, self.groups, rank, weight)
        self.s = nn.Parameter(s)  # (R,)
        # Saved in checkpoints: the decomposition is unique only up to signs, so recomputing it on another
        # machine could pair s with other factors.
        self.register_buffer("u", u)  # (O, R / groups)
        self.register_buffer("vh", vh)  # (R, I / groups * kernel)
        self.register_buffer("rest", rest)
        self.register_parameter("a", None)
        self.register_parameter("bias", plain.bias)  # type: ignore[arg-type]

        # What neighbours may ask of the layer, under the names that torch gives it.
        for name in (_CONVOLUTION_ARGUMENTS if convolution else "in_features out_features").split():
            setattr(self, name, getattr(plain, name))
        self._pad_by_input_size = any(cls.__name__ in _PAD_BY_INPUT_SIZE for cls in type(plain).__mro__)

        # The original without its tensors, for merging: class, arguments and hooks survive. It shares the
        # hook dictionaries with this module, so hooks fire here and handles taken earlier still work.
        shell = copy.copy(plain)
        shell._parameters = dict.fromkeys(plain._parameters)
        object.__setattr__(self, "_shell", shell)  # not a child: it has nothing to train, move or save
        for name in _HOOKS:
            self.__dict__[name] = plain.__dict__[name]
        self.training = plain.training
        self._described = repr(plain)
        self._kernel: tuple[Any, Tensor] | None = None

    @property
    def values(self) -> Tensor:
        """What stands between ``u`` and ``vh`` now, shape ``(R,)``: ``s``, or ``s * exp(a)``."""
        return self.s if self.a is None else self.s * self.a.exp()

    @property
    def weight(self) -> Tensor:
        """The kernel as it stands now, in the shape of the original's; gradients reach ``s`` through it."""
        weight = rebuild(self.u, self.values, self.vh, self.groups).view(self.kernel_shape)
        return weight if self.rest is None else weight + self.rest

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Apply the layer to ``(B, I, ...)``, or ``(..., I)`` if it is linear.

        Args:
            x: The input.
            output_size: Height and width wanted of a transposed convolution, as in torch.
        """
        values = self.values
        factored = torch.is_grad_enabled() and (
            values.requires_grad or self.u.requires_grad or self.vh.requires_grad
        )
        if len(self.kernel_shape) == 2:
            if not factored:
                return F.linear(x, self._plain_kernel(x), self.bias)
            # Autograd alone does it well here: where u and vh are constants it forms no kernel gradient.
            y = F.linear(F.linear(x, self.vh) * values, self.u, self.bias)
            return y if self.rest is None else y + F.linear(x, self.rest)
        if self.transposed:
            return self._transposed_convolution(x, output_size, values if factored else None)
        if not factored:
            x, padding = self._pad(x)
            return convolve(
                x, self._plain_kernel(x), self.bias, (self.stride, padding, self.dilation, self.groups)
            )
        return self._factored_convolution(x, values)

    def _transposed_convolution(
        self, x: Tensor, output_size: Sequence[int] | None, values: Tensor | None
    ) -> Tensor:
        """The transposed order ``V (s (U^T x))``: the small kernel comes first, before the map grows."""
        spatial = len(self.kernel_shape) - 2
        output_padding = self._shell._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, spatial, self.dilation
        )
        geometry = (self.stride, self.padding, output_padding, self.groups, self.dilation)
        if values is None:
            return TRANSPOSE[spatial](x, self._plain_kernel(x), self.bias, *geometry)
        ones = (1,) * spatial
        u = self.u.unflatten(0, (self.groups, -1)).mT.flatten(0, 1)  # (R, I / groups)
        z = CONVOLVE[spatial](x, u.reshape(*u.shape, *ones), groups=self.groups) * values.view(-1, *ones)
        y = TRANSPOSE[spatial](z, self.vh.view(-1, *self.kernel_shape[1:]), self.bias, *geometry)
        return y if self.rest is None else y + TRANSPOSE[spatial](x, self.rest, None, *geometry)

    def _factored_convolution(self, x: Tensor, values: Tensor) -> Tensor:
        unbatched = x.dim() < len(self.kernel_shape)
        x, padding = self._pad(x[None] if unbatched else x)
        geometry: Any = (self.stride, padding, self.dilation, self.groups)
        v = self.vh.view(-1, *self.kernel_shape[1:])
        if self.u.requires_grad or self.vh.requires_grad:
            ones = (1,) * (x.dim() - 2)
            z = convolve(x, v, None, geometry) * values.view(-1, *ones)
            y = convolve(z, self.u.view(*self.u.shape, *ones), self.bias, (1, 0, 1, self.groups))
            if self.rest is not None:
                y = y + convolve(x, self.rest, None, geometry)
        else:
            # A custom function is opaque to autocast, so its input is cast here, as autocast would.
            dtype, device = self.vh.dtype, x.device.type
            if torch.is_autocast_enabled(device) and x.dtype != torch.float64 and dtype != torch.float64:
                dtype = torch.get_autocast_dtype(device)
                x = x.to(dtype)
            if max(self.kernel_size) == 1:
                geometry = (self.stride, padding, dilation_of_ones(x), self.groups)
            if self.rest is None:
                y, _ = FactoredConvolution.apply(x, values, self.u, v, self.bias, geometry, dtype)
            else:
                y, _ = CorrectedConvolution.apply(x, values, self.u, v, self.rest, self.bias, geometry, dtype)
        return y[0] if unbatched else y

    def _pad(self, x: Tensor) -> tuple[Tensor, Any]:
        """Pad ``x`` by hand where a convolution cannot; and the padding left to the convolution."""
        spatial = len(self.kernel_shape) - 2
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if self._pad_by_input_size:
            total = [
                max((math.ceil(n / s) - 1) * s + r + 1 - n, 0)
                for n, s, r in zip(x.shape[-spatial:], self.stride, reach, strict=True)
            ]
        elif self.padding == "same":
            total = reach
        else:
            total = [0] * spatial if self.padding == "valid" else [2 * p for p in self.padding]
        if self.padding_mode == "zeros" and all(t % 2 == 0 for t in total):
            return x, tuple(t // 2 for t in total)
        sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]  # F.pad: last axis first
        return F.pad(x, sides, "constant" if self.padding_mode == "zeros" else self.padding_mode), 0

    def _plain_kernel(self, x: Tensor) -> Tensor:
        """The kernel for evaluation, without gradient, rebuilt only if a factor has changed since.

        It lies in memory as ``x`` does, or torch would turn one of them around in every call.
        """
        if torch.compiler.is_compiling():  # a compiled graph cannot ask for versions; it fuses the product
            return self.weight.detach()
        factors = [t for t in (self.u, self.s, self.vh, self.a, self.rest) if t is not None]
        tracked = not any(t.is_inference() for t in factors)  # inference tensors count no versions
        last = x.dim() == len(self.kernel_shape) == 4 and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last and not x.is_contiguous() else torch.contiguous_format
        state = None
        if tracked:
            state = [layout, *((t.data_ptr(), t._version, t.dtype, t.device) for t in factors)]
        if self._kernel is None or state is None or self._kernel[0] != state:
            self._kernel = (state, _merged_weight(self).contiguous(memory_format=layout))
        return self._kernel[1]

    def train(self, mode: bool = True) -> "SVFLayer":
        """Switch mode and forget the rebuilt kernel: writes through ``s.data`` leave no trace in versions."""
        self._kernel = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernel": None}  # copies and pickles carry the factors only

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take on the rank of the incoming factors: imported checkpoints may hold less than full rank."""
        incoming = state_dict.get(prefix + "s")
        if incoming is not None and incoming.dim() == 1 and len(incoming) % self.groups == 0:
            rank = len(incoming)
            if rank != len(self.s):
                self.s.data = self.s.new_zeros(rank)
                self.u.data = self.u.new_zeros(self.u.shape[0], rank // self.groups)
                self.vh.data = self.vh.new_zeros(rank, self.vh.shape[1])
                if self.a is not None:
                    self.a.data = self.a.new_zeros(rank)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """The layer it stands for and the number of its values."""
        return f"{self._described}, rank={len(self.s)}{'' if self.rest is None else ' and a frozen rest'}"


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def from_factors(plain: nn.Module, u: Tensor, s: Tensor, vh: Tensor) -> SVFLayer:
    """The factored layer with given factors, whatever their rank, in the place of ``plain``.

    Args:
        plain: The layer that says stride, padding, bias, dtype and device; its weight is not read.
        u: Left factors, ``(O, R / groups)``, or with trailing ones as in a 1x1 kernel.
        s: Scales, R of them in any shape.
        vh: Right factors, ``(R, I / groups * kernel positions)`` or shaped like a kernel.

    Raises:
        ValueError: If the shapes do not fit the layer or each other.
    """
    weight = _weight_of(plain)
    groups = plain.groups if isinstance(plain, _CONVOLUTIONS) else 1
    rank = s.numel()
    if (
        rank % groups
        or (u.shape[0], u[0].numel()) != (weight.shape[0], rank // groups)
        or (vh.shape[0], vh[0].numel()) != (rank, weight[0].numel())
    ):
        raise ValueError(
            f"factors u {tuple(u.shape)}, s {tuple(s.shape)}, vh {tuple(vh.shape)} do not make a weight of "
            f"shape {tuple(weight.shape)} with groups={groups}; take the factors that belong to this layer"
        )
    fit = [
        t.detach().to(weight.device, weight.dtype).clone() for t in (u.flatten(1), s.flatten(), vh.flatten(1))
    ]
    return SVFLayer(plain, (fit[0], fit[1], fit[2]))


def _weight_of(plain: nn.Module) -> Tensor:
    """The weight of a layer that can be factored; a ValueError says why another one cannot."""
    kind = type(plain).__name__
    plain_forward = (*(cls.forward for cls in _CONVOLUTIONS), nn.Linear.forward)
    if not isinstance(plain, (*_CONVOLUTIONS, nn.Linear)):
        raise ValueError(f"SVF factors convolutions and linear layers, got {kind}; leave this layer out")
    if not any(cls.__name__ in _PAD_BY_INPUT_SIZE for cls in type(plain).__mro__) and (
        type(plain).forward not in plain_forward
        or getattr(type(plain), "_conv_forward", None)
        not in (None, *(c._conv_forward for c in _CONVOLUTIONS))
    ):
        raise ValueError(
            f"{kind} computes its output in its own way, which factors cannot follow; leave it out"
        )
    weight = plain._parameters.get("weight")
    if weight is None:
        raise ValueError(f"the weight of this {kind} is itself computed; remove its parametrization first")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"this {kind} has no weight yet; run the network once, then decompose")
    if weight.dtype not in TOLERANCE:
        raise ValueError(
            f"SVF factors real floating point weights, got {weight.dtype}; convert the layer first"
        )
    return weight


def _merged_weight(layer: SVFLayer) -> Tensor:
    """The kernel multiplied in float64, without gradient, in the layer's dtype and on its device."""
    # Not an inference tensor even if asked for under inference_mode: a later backward may need it.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(layer.s.device.type, enabled=False):
        device = "cpu" if layer.s.device.type == "mps" else layer.s.device  # no float64 on Apple's GPU
        u, s, vh = (t.to(device, torch.float64) for t in (layer.u, layer.s, layer.vh))
        if layer.a is not None:
            s = s * layer.a.to(device, torch.float64).exp()
        weight = rebuild(u, s, vh, layer.groups).view(layer.kernel_shape)
        if layer.rest is not None:
            weight += layer.rest.to(device)
        return weight.to(layer.s.device, layer.s.dtype)


def plain_layer(layer: SVFLayer) -> nn.Module:
    plain = copy.copy(layer._shell)
    weight = nn.Parameter(_merged_weight(layer), requires_grad=layer.s.requires_grad)
    plain._parameters = {"weight": weight, "bias": layer.bias}
    plain.training = layer.training
    return plain
