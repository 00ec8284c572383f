"""Kilobyte files: the singular values that a run trained, for the pretrained weights it started from.

A file (safetensors) holds the singular values of the factored layers, not the factors: those come back from
decomposing the base weights again. They must have the same directions in the same order, so a file also has:

- the SHA-256 of every frozen tensor of the backbone that no factor touches, names included;
- per singular value one half-precision number that depends on its two directions but not on their common
  sign, which the decomposition leaves open. Values that are equal, or zero, have no directions of their own,
  and another machine may find others; this number shows that, too.

Loading a file onto other base weights is an error that names both. Files for the same ones can be blended.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svf_lightning.backbones.efficientnet import name_before
from svf_lightning.files import replace_file
from svf_lightning.svf.layer import SVFLayer

FORMAT = "svf_lightning singular values 1"
# Of the numbers that stand for directions, which are around 1 and saved in half precision.
TOLERANCE = 0.02


@dataclass(frozen=True)
class SingularValues:
    """What a kilobyte file holds.

    Attributes:
        values: Singular values by layer, ``(R,)`` each.
        directions: A fingerprint of each value's directions, by layer, ``(R,)``, half precision.
        rest: A fingerprint of the frozen rest of the kernel, by layer, ``(1,)``; only where a layer was
            factored at less than full rank.
        trained: What else trained in the backbone (BatchNorm's scale, say), by its name there.
        base: SHA-256 of what stayed frozen.
        head: Everything of the model beside the backbone, by name; empty where it was not asked for.
        about: What the file says of its run: plain strings, numbers and nested dicts of them.
        source: The file, for messages.
    """

    values: dict[str, Tensor]
    directions: dict[str, Tensor]
    rest: dict[str, Tensor]
    trained: dict[str, Tensor]
    base: str
    head: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    source: str = "the values"


def collect(model: nn.Module, head: bool = False, about: Mapping[str, Any] | None = None) -> SingularValues:
    """Take the singular values, and what else trained, out of a model.

    Args:
        model: A method with a ``backbone``, prepared by its strategy, or a backbone alone.
        head: Take everything beside the backbone along. It weighs megabytes, the rest kilobytes.
        about: What to say of the run.

    Raises:
        ValueError: If no layer is factored, or one has factors that its base weights do not give back:
            U or V trained, or they are no singular vectors.
    """
    backbone = _backbone(model)
    layers = _factored(backbone)
    if not layers:
        raise ValueError(
            "no layer of the backbone is factored, so there are no singular values; merge the run instead"
        )
    for name, layer in layers.items():
        _check_factors(name, layer)
    own = {f"{name}.{part}" for name in layers for part in ("s", "a")}
    trained = {
        name: value.detach().cpu().clone()
        for name, value in backbone.named_parameters()
        if value.requires_grad and name not in own
    }
    return SingularValues(
        values={name: layer.values.detach().cpu().clone() for name, layer in layers.items()},
        directions={name: _directions(layer) for name, layer in layers.items()},
        rest={name: _rest(layer) for name, layer in layers.items() if layer.rest is not None},
        trained=trained,
        base=fingerprint(backbone, layers, trained),
        head=_head(model) if head else {},
        about=dict(about or {}),
    )


def fingerprint(backbone: nn.Module, layers: Iterable[str], trained: Iterable[str] = ()) -> str:
    """SHA-256 of a backbone's tensors but for the weights of some layers, factored or not, and some others.

    The same for the pretrained backbone, for one that was factored, and for one whose singular values
    trained since. The weights left out are recognised by their directions instead.

    Args:
        backbone: The network.
        layers: Names of the layers that are factored, or will be.
        trained: Names of further tensors to leave out.
    """
    left_out = {
        f"{name}.{part}" for name in layers for part in ("weight", "s", "a", "u", "vh", "rest")
    } | set(trained)
    digest = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        if name not in left_out:
            known_as = name_before(backbone, name)  # so that files from before a renaming fit
            digest.update(f"{known_as} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load(model: nn.Module, values: SingularValues | str | Path) -> None:
    """Put the values of a file into a model with the base weights that they were trained from.

    Layers that are not factored yet become so. The head is filled if the file has one and ``model`` is more
    than a backbone.

    Args:
        model: A method with a ``backbone``, or a backbone alone; plain, or prepared by the strategy.
        values: A file or its content.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is broken, or the base weights are others than those it was made from:
            another network, other frozen weights, other directions. Nothing is loaded then.
    """
    if not isinstance(values, SingularValues):
        values = read(values)
    backbone, source = _backbone(model), values.source
    modules = dict(backbone.named_modules())
    tensors = backbone.state_dict()
    lost = [name for name in values.values if name not in modules]
    lost += [name for name in values.trained if name not in tensors]
    if lost:
        raise ValueError(
            f"{source} holds values for {lost[0]!r}, which this backbone does not have; "
            f"it belongs to {_describe(values)}"
        )
    found = fingerprint(backbone, values.values, values.trained)
    if found != values.base:
        raise ValueError(
            f"{source} was trained on base weights {values.base[:12]} ({_describe(values)}), but these are "
            f"{found[:12]}; build the backbone with the weights that the run started from"
        )
    layers: dict[str, SVFLayer] = {}
    for name, wanted in values.values.items():
        layer = modules[name]
        if not isinstance(layer, SVFLayer):
            rank = len(wanted) // int(getattr(layer, "groups", 1)) if name in values.rest else None
            layer = SVFLayer(layer, rank=rank)
        _check_directions(name, layer, values)
        layers[name] = layer

    head = {} if model is backbone else values.head
    if head:
        _check_head(model, head, source)
    new = {modules[name]: layer for name, layer in layers.items()}
    for name, module in list(backbone.named_modules(remove_duplicate=False)):
        if new.get(module, module) is not module:
            backbone.set_submodule(name, new[module])
    with torch.no_grad():
        for name, layer in layers.items():
            layer.s.copy_(values.values[name])
            if layer.a is not None:
                layer.a.zero_()
    backbone.load_state_dict(values.trained, strict=False)
    if head:
        model.load_state_dict(head, strict=False)


def blend(parts: Mapping[str | Path, float] | Iterable[tuple[SingularValues, float]]) -> SingularValues:
    """Mix files that were trained from the same base weights: ``a * A + b * B``.

    What else trained, and the head where all files have one, is mixed alike; whole numbers come from the
    first file.

    Args:
        parts: Weight of each file, or of each file's content. The weights add up to 1; negative ones and
            ones above 1 extrapolate.

    Raises:
        ValueError: If the weights do not add up to 1, or the files differ in base weights or layers.

    Example:
        ``write("mixed.safetensors", blend({"cats.safetensors": 0.3, "dogs.safetensors": 0.7}))``
    """
    pairs = (
        [(read(path), weight) for path, weight in parts.items()]
        if isinstance(parts, Mapping)
        else list(parts)
    )
    total = sum(weight for _, weight in pairs)
    if not pairs or abs(total - 1) > 1e-6:
        raise ValueError(
            f"the weights of a blend add up to {total:g}, not 1; that would scale the whole network by it"
        )
    first = pairs[0][0]
    for other, _ in pairs[1:]:
        same_layers = {k: v.shape for k, v in other.values.items()} == {
            k: v.shape for k, v in first.values.items()
        }
        if other.base != first.base or not same_layers or other.trained.keys() != first.trained.keys():
            raise ValueError(
                f"{other.source} and {first.source} cannot be mixed: base weights {other.base[:12]} "
                f"({_describe(other)}) here, {first.base[:12]} ({_describe(first)}) there, or other layers"
            )
        for name, directions in first.directions.items():
            if _differ(directions, other.directions[name]):
                raise ValueError(f"{other.source} and {first.source} have other directions of {name!r}")
    with_head = all(part.head.keys() == first.head.keys() for part, _ in pairs)

    def mixed(which: str) -> dict[str, Tensor]:
        content = [getattr(part, which) for part, _ in pairs]
        return {
            name: sum(weight * c[name].double() for c, (_, weight) in zip(content, pairs, strict=True)).to(
                value.dtype
            )
            if value.is_floating_point()
            else value
            for name, value in content[0].items()
        }

    return replace(
        first,
        values=mixed("values"),
        trained=mixed("trained"),
        head=mixed("head") if with_head else {},
        about={**first.about, "blend": {Path(p.source).name: weight for p, weight in pairs}},
        source="the blend",
    )


def write(path: str | Path, values: SingularValues) -> None:
    """Write a kilobyte file, beside its place first, so that it is never seen half-written."""
    from safetensors.torch import save

    tensors = {
        **{f"{name}.s": value for name, value in values.values.items()},
        **{f"{name}.directions": value for name, value in values.directions.items()},
        **{f"{name}.rest": value for name, value in values.rest.items()},
        **{f"trained/{name}": value for name, value in values.trained.items()},
        **{f"head/{name}": value for name, value in values.head.items()},
    }
    metadata = {"format": FORMAT, "base": values.base, "about": json.dumps(values.about)}
    content = save({name: value.contiguous() for name, value in tensors.items()}, metadata)
    replace_file(Path(path), lambda temporary: temporary.write_bytes(content))


def read(path: str | Path) -> SingularValues:
    """Read a kilobyte file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the file is no safetensors file, or not one of these.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}; `svf export RUN --singular-values FILE` writes one")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}); is it truncated?") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds no singular values: its format is {metadata.get('format')!r}, not {FORMAT!r}; "
            "`svf export RUN --singular-values FILE` writes such a file"
        )

    def part(prefix: str = "", suffix: str = "") -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix).removesuffix(suffix): value
            for name, value in tensors.items()
            if name.startswith(prefix) and name.endswith(suffix) and (prefix or "/" not in name)
        }

    return SingularValues(
        values=part(suffix=".s"),
        directions=part(suffix=".directions"),
        rest=part(suffix=".rest"),
        trained=part("trained/"),
        base=metadata["base"],
        head=part("head/"),
        about=json.loads(metadata["about"]),
        source=str(path),
    )


def _backbone(model: nn.Module) -> nn.Module:
    backbone = getattr(model, "backbone", None)
    return backbone if isinstance(backbone, nn.Module) else model


def _factored(backbone: nn.Module) -> dict[str, SVFLayer]:
    return {name: layer for name, layer in backbone.named_modules() if isinstance(layer, SVFLayer)}


def _head(model: nn.Module) -> dict[str, Tensor]:
    """Everything of a model beside its backbone."""
    return {
        name: value.detach().cpu().clone()
        for name, value in model.state_dict().items()
        if not name.startswith("backbone.")
    }


def _check_head(model: nn.Module, head: Mapping[str, Tensor], source: str) -> None:
    own = _head(model)
    for name in [*own, *head]:
        if name not in own or name not in head or own[name].shape != head[name].shape:
            raise ValueError(
                f"{source} holds the head of another method: {name!r} differs; build the model as the run did"
            )


def _check_factors(name: str, layer: SVFLayer) -> None:
    """Refuse factors that decomposing the base weights would not give back."""
    if layer.u.requires_grad or layer.vh.requires_grad:
        raise ValueError(f"{name}: U or V trains, which is no kilobytes; merge the run instead")
    full = layer.groups * min(layer.kernel_shape[0] // layer.groups, layer.vh.shape[1])
    per_group = layer.vh.detach().double().cpu().unflatten(0, (layer.groups, -1))  # (groups, R / groups, N)
    gram = per_group @ per_group.mT
    if (len(layer.s) < full and layer.rest is None) or not torch.allclose(
        gram, torch.eye(gram.shape[-1], dtype=gram.dtype).expand_as(gram), atol=1e-3
    ):
        raise ValueError(
            f"{name}: its factors are not the singular vectors of base weights at full rank, so the base "
            "weights would not give them back; merge the run instead"
        )


def _probe(length: int) -> Tensor:
    """Numbers between -1 and 1 without a pattern, the same on every machine."""
    return torch.arange(1, length + 1, dtype=torch.float64).square().sin()


@torch.no_grad()
def _directions(layer: SVFLayer) -> Tensor:
    """One number per singular value, ``(p . u)(v . q)`` for fixed p and q: blind to the common sign."""
    u, vh = layer.u.double().cpu(), layer.vh.double().cpu()
    left = (u * _probe(len(u))[:, None]).unflatten(0, (layer.groups, -1)).sum(1).flatten()  # (R,)
    return (left * (vh @ _probe(vh.shape[1]))).half()


@torch.no_grad()
def _rest(layer: SVFLayer) -> Tensor:
    assert layer.rest is not None
    rest = layer.rest.double().cpu().flatten(1)
    return (_probe(len(rest)) @ rest @ _probe(rest.shape[1]))[None].float()


def _differ(a: Tensor, b: Tensor) -> list[int]:
    """Positions of the values whose directions are not the same."""
    a, b = a.double(), b.double()
    return ((a - b).abs() > TOLERANCE * (1 + b.abs())).nonzero().flatten().tolist()


def _check_directions(name: str, layer: SVFLayer, values: SingularValues) -> None:
    count = len(values.values[name])
    if not values.values[name].isfinite().all():
        raise ValueError(f"{values.source}: {name!r} has NaN or infinite values; the run has diverged")
    if len(layer.s) != count:
        raise ValueError(
            f"{values.source} holds {count} values for {name!r}, here it has {len(layer.s)}; "
            f"it belongs to {_describe(values)}"
        )
    differing = _differ(_directions(layer), values.directions[name])
    rest = values.rest.get(name)
    if (rest is None) != (layer.rest is None):
        raise ValueError(f"{values.source}: {name!r} was factored at another rank than here")
    if rest is not None and not torch.allclose(_rest(layer), rest, rtol=1e-3, atol=1e-3):
        differing = differing or [0]
    if 2 * len(differing) > count:
        raise ValueError(
            f"{values.source} was trained on other base weights ({_describe(values)}): {name!r} has other "
            "singular vectors here; build the backbone with the weights that the run started from"
        )
    if differing:
        raise ValueError(
            f"{values.source}: directions {differing[:5]} of {name!r} come out differently here, as equal "
            "singular values allow; use the run's checkpoint, or `svf merge` it"
        )


def _describe(values: SingularValues) -> str:
    about = values.about.get("identity", {})
    known = [str(about[key]) for key in ("backbone", "model", "data") if key in about]
    known += [f"weights {values.about['weights']}"] if "weights" in values.about else []
    return ", ".join(known) or f"{len(values.values)} factored layers"
