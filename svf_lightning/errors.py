"""Show a user's mistake as one line; a bug still ends in a traceback."""

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def one_line_errors(function: Callable[P, R]) -> Callable[P, R]:
    """End the program with one line and status 1 where ``function`` fails through its input.

    That is ValueError and OSError, which the package raises at its borders (configuration values,
    files, shapes), and what Hydra raises about overrides. ``SVF_TRACEBACK=1`` shows the whole
    traceback instead. A pipe that closes ends the program quietly.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # or Hydra prints and exits before we can
        try:
            result = function(*args, **kwargs)
            sys.stdout.flush()  # or a closed pipe would be found only when the interpreter ends
            return result
        except BrokenPipeError:  # whoever read the output has gone, as `| head` does: that is no error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except Exception as error:
            message = _of_configuration(error)
            if message is None and isinstance(error, (ValueError, OSError)):
                message = str(error)
            if message is None or os.environ.get("SVF_TRACEBACK") == "1":
                raise
            # A file name may hold bytes that are no UTF-8, which no stream takes.
            print("error:", message.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
            sys.exit(1)

    return wrapped


def _of_configuration(error: Exception) -> str | None:
    """Hydra's message about a wrong override, in one line and with a remedy; None for other errors."""
    if type(error).__module__.split(".")[0] not in ("hydra", "omegaconf"):
        return None
    lines = [line.strip() for line in str(error).split("Config search path")[0].splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith(("full_key", "object_type")))
    return f"{text} (`--cfg job` prints every key and value, `--help` every choice)"
