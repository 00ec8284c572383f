"""Errors carry their problems, and a closed pipe is none."""

import os
import pickle
import subprocess
import sys

import pytest

from svf_lightning.errors import DataError, MissingFileError, Problem, problems_of
from tests.runs.test_sweeps import made_run

COMMAND = """
import sys
from svf_lightning.errors import one_line_errors

@one_line_errors
def main():
    for number in range({lines}):
        print("a line of the output", number)
    {end}

main()
"""


def closed_pipe(code: str, unbuffered: str = "") -> subprocess.CompletedProcess:
    """Run code whose reader has left before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    try:
        return subprocess.run(
            [sys.executable, "-c", code],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env=environment,
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_pipe_that_closes_while_printing_ends_the_command_without_a_word(unbuffered):
    ended = closed_pipe(COMMAND.format(lines=100_000, end="pass"), unbuffered)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.parametrize(("end", "status"), [("pass", 0), ("sys.exit(3)", 3)])
def test_a_pipe_that_closes_before_the_last_flush_changes_no_status(end, status):
    ended = closed_pipe(COMMAND.format(lines=1, end=end))
    assert (ended.returncode, ended.stderr) == (status, "")


def test_another_broken_pipe_is_told():
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND.format(lines=0, end="raise BrokenPipeError(32, 'Broken pipe')")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert ended.stderr == "error: [Errno 32] Broken pipe\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["report", "RUNS"], ["report", "--help"], ["check", "RUNS"]])
def test_every_command_ends_quietly_when_its_pipe_closes(arguments, unbuffered, tmp_path):
    made_run(tmp_path, "svf", 0, 0.5)
    command = ["svf", *(str(tmp_path) if word == "RUNS" else word for word in arguments)]
    code = f"import sys; from svf_lightning.cli import main; sys.argv = {command}; main()"
    assert closed_pipe(code, unbuffered).stderr == ""


@pytest.mark.parametrize("kind", [DataError, MissingFileError])
def test_an_error_brings_its_problems_to_another_process(kind):
    error = kind.of("a: b.png", "is missing; gone", "put it back: soon")
    again = pickle.loads(pickle.dumps(error))

    assert type(again) is kind
    assert str(again) == "a: b.png is missing; gone: put it back: soon"
    assert again.problems == (Problem("a: b.png", "is missing; gone", "put it back: soon"),)
    assert isinstance(error, ValueError)
    assert isinstance(error, FileNotFoundError) == (kind is MissingFileError)


def test_an_error_without_problems_is_about_the_file_at_hand():
    (problem,) = problems_of(OSError(28, "No space left"), "x.png", "make room")
    assert (problem.file, problem.remedy) == ("x.png", "make room")
    assert "No space left" in problem.found
