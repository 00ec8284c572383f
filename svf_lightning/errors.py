"""What the user did wrong ends in one line; what we did wrong ends in a traceback."""

import functools
import os
import select
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Problem(NamedTuple):
    """Something wrong with one file, or worth knowing; an error keeps that file from being used."""

    file: str
    found: str  # goes on where the file's name ends: "is missing"
    remedy: str
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return printable(f"{self.file}: {self.found}; {self.remedy}")

    @property
    def sentence(self) -> str:
        """The same as an error message begins: with the file and what is wrong with it."""
        return f"{self.file} {self.found}: {self.remedy}"


class DataError(ValueError):
    """The user's files cannot be used.

    Args:
        message: For people.
        problems: The same for programs: what is wrong with each file.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)

    @classmethod
    def of(cls, file: str | Path, found: str, remedy: str, message: str | None = None) -> "DataError":
        """An error about one file; its message is the problem's sentence, unless another is given."""
        problem = Problem(str(file), found, remedy)
        return cls(message or problem.sentence, [problem])


class MissingFileError(FileNotFoundError, DataError):
    """Files are missing, and nothing else is wrong."""

    __init__ = DataError.__init__  # FileNotFoundError has one of its own, and comes first


def problems_of(error: Exception, file: str | Path, remedy: str) -> tuple[Problem, ...]:
    """The problems that an error tells of; one without any makes a single problem of ``file``."""
    if isinstance(error, DataError) and error.problems:
        return error.problems
    return (Problem(str(file), f"cannot be used ({error})", remedy),)


def printable(text: str) -> str:
    r"""A text with bytes that are no UTF-8 spelled out, as old archives leave them in file names.

    Python keeps such bytes as lone surrogates, which neither a terminal nor a file takes.

    Example:
        >>> print(printable(b"caf\xe9.jpg".decode("utf-8", "surrogateescape")))
        caf\udce9.jpg
    """
    return text.encode("utf-8", "backslashreplace").decode()


def one_line_errors(function: Callable[P, R]) -> Callable[P, R]:
    """End the program with one line and status 1 where ``function`` fails through its input.

    That is ValueError and OSError, which the package raises at its borders (configuration values,
    files, shapes), and what Hydra raises about overrides. ``SVF_TRACEBACK=1`` shows the whole
    traceback instead. Where the reader of the output has left, as in ``svf report | head``, the
    program ends without a word.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # or Hydra prints and exits before we can
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and drop_unread_output():
                sys.exit(1)
            message = one_line(error)
            if message is None or os.environ.get("SVF_TRACEBACK") == "1":
                raise
            print("error:", printable(message), file=sys.stderr)
            sys.exit(1)
        finally:
            drop_unread_output()

    return wrapped


def one_line(error: Exception) -> str | None:
    """What to tell users of an error that their input caused; None for an error of ours."""
    message = _of_configuration(error)
    if message is None and isinstance(error, (ValueError, OSError)):
        message = str(error)
    return message


def drop_unread_output() -> bool:
    """Send what is still to be printed nowhere if its reader has left; whether one has.

    Python prints the rest of it when it exits, and would complain then.
    """
    left = False
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
        with suppress(OSError, ValueError, AttributeError):  # a test's stream has no number, Windows no poll
            pipe = select.poll()
            pipe.register(stream.fileno(), 0)
            if any(state & select.POLLERR for _, state in pipe.poll(0)):
                left = True
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
    return left


def _of_configuration(error: Exception) -> str | None:
    """Hydra's message about a wrong override, in one line and with a remedy; None for other errors."""
    if type(error).__module__.split(".")[0] not in ("hydra", "omegaconf"):
        return None
    lines = [line.strip() for line in str(error).split("Config search path")[0].splitlines()]
    if type(error).__name__ == "OverrideParseException":
        # Hydra's own message speaks of tokens.
        argument = str(getattr(error, "override", ""))
        key, _, value = argument.partition("=")
        value = value.strip("'\"") or "VALUE"
        return (
            f"cannot read the argument {argument}: it must be KEY=VALUE, and a value with = , ( ) [ ] {{ }} "
            f": or a quote in it needs quotes inside those of the shell: '{key}=\"{value}\"'"
        )
    text = " ".join(line for line in lines if line and not line.startswith(("full_key", "object_type")))
    return f"{text} (`--cfg job` prints every key and value, `--help` every choice)"
