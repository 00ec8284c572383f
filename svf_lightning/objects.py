"""Build objects from a configuration: nested plain values whose ``_target_`` entries name code."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

# What files may name without anybody's word for it: code whose calls build a run and do nothing else.
ROOMS = (
    *(f"svf_lightning.{room}" for room in ("backbones", "models", "finetune", "training")),
    *(
        f"svf_lightning.data.{file}"
        for file in ("coco", "datamodule", "emoji", "folder", "fss1000", "pascal", "base_images")
    ),
)
TRAINERS = (
    "pytorch_lightning.Trainer",
    "pytorch_lightning.strategies.DDPStrategy",
    "pytorch_lightning.loggers.CSVLogger",
    "pytorch_lightning.loggers.TensorBoardLogger",
)


def build_object(node: Mapping[str, Any], where: str, **arguments: Any) -> Any:
    """Build what a configuration names, and all that is named inside of it.

    Args:
        node: A mapping with a ``_target_``; ``_partial_: true`` gives a function that waits for the rest.
        where: What to call it in messages, such as "model (conf/model/baseline.yaml)".
        arguments: More arguments, which are objects already.

    Raises:
        ValueError: If a ``_target_`` does not exist or does not take one of its arguments; and whatever the
            called code raises for values that are not possible.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    for path, inner in named_targets(node):
        place = f"{where}{path and f', {path}'}"
        names = [str(key) for key in inner if not str(key).startswith("_")]
        check_arguments(_target(inner["_target_"], place), names, place)
    try:
        return instantiate(dict(node), _convert_="all", **arguments)
    except InstantiationException as error:
        # What the user did wrong is in the cause; Hydra's wrapping repeats it in four lines.
        if isinstance(error.__cause__, (ValueError, OSError)):
            raise error.__cause__ from None
        if "unexpected keyword argument" in str(error.__cause__):  # of what takes any and hands them on
            raise ValueError(f"{where}: {error.__cause__}") from None
        raise


def check_trust(node: Any, source: str, trust: Sequence[str] = ()) -> None:
    """Refuse a configuration from a file that names code which a run does not need.

    Nothing is called, and no module is imported that is not trusted.

    Args:
        node: Plain values, of any depth.
        source: The file, for the message.
        trust: Modules or packages that may be called beside those of this package.

    Raises:
        ValueError: Naming the first such code.
    """
    from hydra.utils import get_object

    for path, inner in named_targets(node):
        name = inner["_target_"]
        trusted = isinstance(name, str) and name in TRAINERS
        for module in (*ROOMS, *trust):
            if not trusted and isinstance(name, str) and name.startswith(f"{module}."):
                # Not `svf_lightning.data.emoji.json.loads`: it has to be defined there.
                home = getattr(get_object(name), "__module__", "")
                trusted = home == module or str(home).startswith(f"{module}.")
        if not trusted:
            raise ValueError(
                f"{source} wants to call {name!r} ({path or 'at the top'}), which is none of svf_lightning's "
                "own parts of a run; if you trust its author, name the module: trust=[MODULE]"
            )


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


def _target(name: str, where: str) -> Callable[..., Any]:
    from hydra.utils import get_object

    try:
        return get_object(name)
    except (ImportError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{where}: _target_ {name!r} cannot be imported ({reason})") from None
