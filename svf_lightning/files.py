"""Write files whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file under another name, then put it at ``path`` in one step.

    Nobody ever reads half a file, and of two writers the last one wins. A folder that is missing is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, in UTF-8, whole or not at all."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
