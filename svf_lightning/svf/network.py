"""Factor the layers of a network in place, merge them back, and save or load what trains."""

import difflib
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from svf_lightning.svf.layer import SVFLayer, plain_layer

# Layers to factor, those that are, and those that must be refused rather than overlooked.
FACTORABLE: tuple[type[nn.Module], ...] = (SVFLayer, nn.Linear, nn.modules.conv._ConvNd)


def apply_svf(module: nn.Module, layers: Sequence[str] | None = None, rank: int | None = None) -> nn.Module:
    """Replace convolutions and linear layers by factored ones, in place.

    What the network computes does not change. Layers that are factored already are left alone, so a
    second call changes nothing. A layer that appears under several names is replaced under all of them
    by one new layer; two layers that share only their weight come apart. The new ``s`` train; all else
    is left as it was, so freeze the network first if ``s`` alone should train.

    Args:
        module: A network, or a single layer.
        layers: Names of submodules to look in, such as ``("layer3", "layer4.0.conv1")``; None means all.
        rank: How many values of a layer are held as factors, the largest ones; None means all. In a grouped
            layer it counts per group, and a group with fewer gives all it has.

    Returns:
        ``module``, or its replacement where ``module`` itself is a layer.

    Raises:
        ValueError: If a name does not exist or holds nothing to factor, or a layer cannot be factored, has
            a lower rank than asked for, or is factored already at another rank.

    Example:
        >>> apply_svf(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
        Sequential(
          (0): SVFLayer(Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1)), rank=8)
          (1): ReLU()
        )
    """
    chosen: dict[nn.Module, str] = {}
    for prefix in [""] if layers is None else [layers] if isinstance(layers, str) else layers:
        found = {
            child: name for name, child in modules_under(module, prefix) if isinstance(child, FACTORABLE)
        }
        if not found and layers is not None:
            raise ValueError(f"layers: {prefix!r} holds no convolution or linear layer; name one that does")
        chosen |= found
    new: dict[nn.Module, nn.Module] = {}
    for plain, name in chosen.items():
        try:
            if not isinstance(plain, SVFLayer):
                new[plain] = SVFLayer(plain, rank=rank)
            elif rank is not None and len(plain.s) > rank * plain.groups:
                raise ValueError(
                    f"is factored already, with {len(plain.s)} values and not {rank}; merge_svf first"
                )
        except ValueError as error:
            raise ValueError(f"{name or type(plain).__name__}: {error}") from None
    return _replace(module, new)


def merge_svf(module: nn.Module) -> nn.Module:
    """Fold every factored layer back into the plain layer it came from, in place.

    Class, arguments, bias and hooks are the original's; the weight is ``U diag(s) V^T`` with ``s`` as it
    stands, multiplied in float64.

    Returns:
        ``module``, or its replacement where ``module`` itself is a factored layer.
    """
    return _replace(
        module, {layer: plain_layer(layer) for layer in module.modules() if isinstance(layer, SVFLayer)}
    )


def singular_values(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the trained values of every factored layer, by the layer's name; shape ``(R,)`` each."""
    return {
        name: layer.values.detach().clone()
        for name, layer in module.named_modules()
        if isinstance(layer, SVFLayer)
    }


def svf_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """What SVF trains, under the names that ``module.state_dict()`` gives it; not copied.

    That is the ``s`` of every factored layer, its ``a`` where there is one, and ``u`` and ``vh`` only
    where they train.
    """
    return {
        f"{name}.{part}".lstrip("."): getattr(layer, part).detach()
        for name, layer in module.named_modules()
        if isinstance(layer, SVFLayer)
        for part in ("s", "a", "u", "vh")
        if layer._parameters.get(part) is not None
    }


def load_svf_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what :func:`svf_state_dict` gave: all of it, or nothing and an error.

    Singular values mean something only beside the factors they were trained with: same base weights, same
    layers. This function sees names and shapes alone; the files of ``singular_files.py`` check the rest.

    Raises:
        ValueError: At the first name that is missing, left over or of another shape, or if a value is NaN
            or infinite.
    """
    own = svf_state_dict(module)
    for name in [*state, *own]:
        if name not in own:
            near = difflib.get_close_matches(name, own, n=3) or list(own)[:3]
            hint = f"did you mean {', '.join(map(repr, near))}?" if near else "call apply_svf first"
            raise ValueError(f"{name!r} is no value of a factored layer here; {hint}")
        if name not in state:
            raise ValueError(f"there is no {name!r} in the state; factor the layers that it was saved from")
        if state[name].shape != own[name].shape:
            raise ValueError(
                f"{name!r} has shape {tuple(state[name].shape)}, here it has {tuple(own[name].shape)}; "
                "the state belongs to another network or another rank"
            )
        if not state[name].isfinite().all():
            raise ValueError(f"{name!r} holds NaN or infinity; the training that made it has diverged")
    for name, value in own.items():
        value.copy_(state[name])


def modules_under(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Every module at or below a dotted name, under its full name."""
    names = [name for name, _ in module.named_modules(remove_duplicate=False)]
    if prefix not in names:
        near = difflib.get_close_matches(prefix, names, n=3)
        near += [name for name in names if name.endswith("." + prefix)][:3]
        near = near or [name for name, _ in module.named_children()]
        raise ValueError(
            f"layers: no module is called {prefix!r}; did you mean {', '.join(map(repr, near))}?"
        )
    for name, child in module.named_modules(remove_duplicate=False):
        if prefix in ("", name) or name.startswith(prefix + "."):
            yield name, child


def _replace(module: nn.Module, new: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put new modules where the old ones are, under every name that they have."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, name, new[child])
    return new.get(module, module)
