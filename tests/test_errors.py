"""A user's mistake ends in one line, and a closed pipe in none."""

import subprocess
import sys

import pytest

PRINTS = """
from svf_lightning.errors import one_line_errors

@one_line_errors
def command():
    for number in range({lines}):
        print(number)

command()
"""


@pytest.mark.parametrize("lines", [1, 100_000])  # found when the output is flushed, and when it is printed
def test_a_command_whose_reader_has_gone_ends_quietly(lines):
    command = [sys.executable, "-c", PRINTS.format(lines=lines)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # before anything is printed
        said = process.stderr.read().decode()
    assert said == ""
    assert process.returncode == 0
