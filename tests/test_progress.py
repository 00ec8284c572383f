"""Progress where there is no terminal; pytest's own streams are none."""

import re

import pytest

from svf_lightning.progress import Progress, track


def test_items_pass_through_and_plain_lines_tell_how_far_it_is(capsys):
    assert list(track("abc", "counting", 3, "letters", interval=0.0)) == ["a", "b", "c"]

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"counting: 2 of 3 letters, [\d.]+/s, \d+ s left", lines[1])


def test_quick_work_says_nothing(capsys):
    list(track("abc", "counting", 3))

    assert capsys.readouterr().err == ""


def test_a_state_worth_keeping_is_said_however_quick(capsys):
    with Progress("training", 2, "episodes") as progress:
        progress.advance(2, note="loss 0.5")

    assert re.fullmatch(r"training: 2 episodes in .* s, .*/s, loss 0.5\n", capsys.readouterr().err)


def test_an_error_in_the_work_is_not_swallowed():
    with pytest.raises(KeyError), Progress("counting"):
        raise KeyError
