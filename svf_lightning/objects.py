"""Build objects from a configuration: nested plain values whose ``_target_`` entries name code."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

# What files may name without anybody's word for it. Of a room or module: the classes and functions that are
# defined in it and have no underscore, all of which only compute. Elsewhere: single names, since some of
# their neighbours write files.
PARTS = (
    "svf_lightning.models",
    "svf_lightning.finetune",
    "svf_lightning.training.losses",
    "svf_lightning.training.base_learner.bam",
    "svf_lightning.training.segmenter.FewShotSegmenter",
    "svf_lightning.backbones.efficientnet.efficientnet_lite0",
    "svf_lightning.backbones.resnet.resnet50",
    "svf_lightning.backbones.resnet.resnet101",
    "svf_lightning.backbones.timm.timm_features",
    "svf_lightning.backbones.vgg.vgg16",
    "svf_lightning.data.datamodule.FewShotDataModule",
    "svf_lightning.data.datamodule.own_images",
    "svf_lightning.data.coco.Coco",
    "svf_lightning.data.emoji.Emoji",
    "svf_lightning.data.folder.Folder",
    "svf_lightning.data.fss1000.Fss1000",
    "svf_lightning.data.pascal.Pascal",
)
TRAINERS = ("pytorch_lightning.Trainer", "pytorch_lightning.strategies.DDPStrategy")

_SPECIAL = (
    "_target_",
    "_partial_",
    "_args_",
    "_recursive_",
    "_convert_",
)  # Hydra's words; the rest are arguments


def build_object(node: Mapping[str, Any], where: str, **arguments: Any) -> Any:
    """Build what a configuration names, and all that is named inside of it, as ``hydra.utils.instantiate``.

    Unlike there, text stays text: ``${...}`` is not looked up, in the environment or elsewhere.

    Args:
        node: A mapping with a ``_target_``; ``_partial_: true`` gives a function that waits for the rest.
        where: What to call it in messages, such as "model (conf/model/baseline.yaml)".
        arguments: More arguments, which are objects already.

    Raises:
        ValueError: If there is no ``_target_``, one does not exist or does not take one of its arguments, or
            the called code fails.
        OSError: As the called code raises it.
    """
    if "_target_" not in node:
        raise ValueError(f"{where} has no _target_; name the class or function to call")
    for path, inner in named_targets(node):
        place = f"{where}{path and f', {path}'}"
        names = [str(key) for key in inner if not str(key).startswith("_")]
        check_arguments(_target(inner["_target_"], place), names, place)
    return _build(node, where, arguments)


def _build(node: Any, where: str, arguments: Mapping[str, Any]) -> Any:
    if isinstance(node, (list, tuple)):
        return [_build(item, f"{where}.{number}", {}) for number, item in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    given = {key: value for key, value in node.items() if key not in _SPECIAL or "_target_" not in node}
    positional = node.get("_args_", ()) if "_target_" in node else ()
    if node.get("_recursive_", True):
        given = {key: _build(value, f"{where}.{key}", {}) for key, value in given.items()}
        positional = _build(positional, f"{where}._args_", {})
    if "_target_" not in node:
        return given
    target, given = _target(node["_target_"], where), {**given, **arguments}
    if node.get("_partial_"):
        return functools.partial(target, *positional, **given)
    try:
        return target(*positional, **given)
    except (ValueError, OSError):
        raise
    except Exception as error:  # values that are not possible fail in as many ways as there is code
        raise ValueError(f"{where}: {' '.join(str(error).split()) or type(error).__name__}") from error


def check_trust(node: Any, source: str, trust: str | Sequence[str] = ()) -> None:
    """Refuse a configuration from a file that names code which a run does not need.

    Nothing is called, and no module is imported that is not trusted.

    Args:
        node: Plain values, of any depth.
        source: The file, for the message.
        trust: Modules or packages that may be called beside the parts of a run in this one. What they only
            import from elsewhere is not theirs.

    Raises:
        ValueError: Naming the first such code.
    """
    modules = (trust,) if isinstance(trust, str) else trust
    for path, inner in named_targets(node):
        name = inner["_target_"]
        place = path or "at the top"
        if not (_is_part(name) or _is_defined_in(name, modules, f"{source}, {place}")):
            raise ValueError(
                f"{source} wants to call {name!r} ({place}), which is none of svf_lightning's own parts of a "
                "run; if you trust its author, name the module: trust=[MODULE], or --trust MODULE"
            )


def _is_part(name: object) -> bool:
    """Whether a name is that of a part of a run; of a class or function itself, not of what hangs on it."""
    if not isinstance(name, str):
        return False
    if name in TRAINERS:
        return True
    public = all(piece.isidentifier() and not piece.startswith("_") for piece in name.split("."))
    if not public or not any(f"{name}.".startswith(f"{part}.") for part in PARTS):
        return False
    module, _, attribute = name.rpartition(".")
    try:
        code = getattr(import_module(module), attribute, None)
    except ModuleNotFoundError:
        return False
    return (inspect.isclass(code) or inspect.isfunction(code)) and code.__module__ == module


def _is_defined_in(name: object, modules: Sequence[str], where: str) -> bool:
    """Whether code is defined in one of these modules or packages, not merely within reach of it."""
    for module in modules:
        if isinstance(name, str) and name.startswith(f"{module}."):
            home = str(getattr(_target(name, where), "__module__", ""))
            if f"{home}.".startswith(f"{module}."):
                return True
    return False


def named_targets(node: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping with a ``_target_`` at any depth, with its dotted place below ``node``."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, node
        children = list(node.items())
    else:
        children = list(enumerate(node)) if isinstance(node, (list, tuple)) else []
    for key, value in children:
        yield from named_targets(value, f"{path}.{key}".lstrip("."))


def check_arguments(target: Callable[..., Any], names: Iterable[str], where: str) -> None:
    """Refuse arguments that a class or function does not take.

    Raises:
        ValueError: Naming the first one, and the nearest that exists or all.
    """
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:
        return  # built-in code does not say what it takes
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for name in names:
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(parameters)}"
            raise ValueError(f"{where}: {target.__qualname__} has no argument {name!r}; {hint}")


def _target(name: Any, where: str) -> Callable[..., Any]:
    from hydra.utils import get_object

    if not isinstance(name, str):
        raise ValueError(f"{where}: _target_ must be the dotted name of a class or function, got {name!r}")
    try:
        code = get_object(name)
    except (ImportError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{where}: _target_ {name!r} cannot be imported ({reason})") from None
    if not callable(code):
        raise ValueError(f"{where}: _target_ {name!r} is no class or function; name one")
    return code
