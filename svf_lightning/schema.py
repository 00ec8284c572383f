"""Results in JSON name what they are of: every file says its kind and version, and fits a schema.

The schema is ``results.schema.json`` beside this file (JSON Schema 2020-12), for other programs too. Its
kinds are "metrics", "evaluation", "base" and "predictions". Files of before versions have no entry
``schema``; :func:`migrate` brings them up to date, and nothing else does.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema

FILE = Path(__file__).with_name("results.schema.json")


def checked(content: Mapping[str, Any], kind: str, source: str | Path) -> dict[str, Any]:
    """A result as it is to be written: plain JSON values that name their schema, and fit it.

    Args:
        content: Without the name.
        kind: Such as "metrics".
        source: The file that it will be, for the message.

    Raises:
        ValueError: Naming the first entry that does not fit.
    """
    named = json.loads(json.dumps({"schema": _name(kind), **content}))  # as whoever reads it will see it
    _check(named, kind, source)
    return named


def read(path: Path, kind: str) -> dict[str, Any]:
    """Read a result of this version or an earlier one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no whole JSON file, of another kind or version, or does not fit its schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not a whole {kind}.json ({error}); delete it or run that job again"
        ) from None
    if isinstance(content, dict):
        content = migrate(content, kind)
        if content["schema"] != _name(kind):
            raise ValueError(
                f"{path} is a result of {content['schema']!r}, but {_name(kind)!r} and earlier ones are read "
                "here; if it is of a later version, update svf_lightning"
            )
    _check(content, kind, path)
    return content


def migrate(content: dict[str, Any], kind: str) -> dict[str, Any]:
    """Bring a result of an earlier version up to date; one that names its version is left as it is.

    Those without a name, of before version 1, have today's entries as far as they were known then, and are
    marked, since some may be missing.
    """
    return content if "schema" in content else {"schema": _name(kind), "migrated": True, **content}


def _check(content: Any, kind: str, source: str | Path) -> None:
    error = jsonschema.exceptions.best_match(_validator(kind).iter_errors(content))
    if error is not None:
        place = ".".join(map(str, error.absolute_path))
        raise ValueError(
            f"{source} does not fit {_name(kind)!r}: {f'{place}: ' if place else ''}{error.message}; "
            "delete it or run that job again"
        )


@functools.cache
def _schema() -> Any:
    return json.loads(FILE.read_text(encoding="utf-8"))


def _name(kind: str) -> str:
    return _schema()["$defs"][kind]["properties"]["schema"]["const"]


@functools.cache
def _validator(kind: str) -> Any:
    def maximum(_: Any, limit: float, value: Any, __: Any) -> Iterator[Any]:
        if isinstance(value, (int, float)) and not value <= limit:  # NaN, too, which compares with nothing
            yield jsonschema.ValidationError(f"{value} is more than {limit}")

    kind_of_draft = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"maximum": maximum})
    return kind_of_draft({"$ref": f"#/$defs/{kind}", "$defs": _schema()["$defs"]})
