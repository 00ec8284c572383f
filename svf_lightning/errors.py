"""What the user did wrong ends in one line; what we did wrong ends in a traceback."""

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def one_line_errors(function: Callable[P, R]) -> Callable[P, R]:
    """End the program with one line and status 1 where ``function`` raises ValueError or OSError.

    These are what the package raises at its borders: configuration values, files, shapes.
    ``HYDRA_FULL_ERROR=1`` shows the whole traceback instead.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError) as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            logging.getLogger("svf").debug("", exc_info=True)
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    return wrapped
