"""The ``svf`` command."""

from pathlib import Path
from typing import Annotated

import typer

from svf_lightning.errors import one_line_errors

app = typer.Typer(
    help="Few-shot segmentation with singular value fine-tuning. Training is `python train.py --help`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def svf() -> None:
    """Keeps sub-commands sub-commands while there is only one."""


@app.command()
@one_line_errors
def report(
    runs: Annotated[Path, typer.Argument(help="The folder that holds the runs.")] = Path("runs"),
) -> None:
    """Print the novel-class mIoU of finished runs: folds x fine-tuning strategies, with the mean."""
    from rich.console import Console

    from svf_lightning.analysis import tables

    console = Console()
    for title, table in tables.report(tables.read_results(runs)):
        console.print(title, table, sep="\n", highlight=False)


def main() -> None:
    """Entry point of the ``svf`` command."""
    app()
