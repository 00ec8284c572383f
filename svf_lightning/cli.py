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


Trust = Annotated[
    list[str] | None,
    typer.Option(help="A module of yours, or of an author you trust, that the run may call; repeat it."),
]


@app.callback()
def svf() -> None:
    """Keeps sub-commands sub-commands while there is only one."""


@app.command()
@one_line_errors
def report(
    runs: Annotated[Path, typer.Argument(help="The folder that holds the runs.")] = Path("runs"),
    table: Annotated[
        str | None, typer.Option(help="A table of the SVF paper, table05 to table13, beside its numbers.")
    ] = None,
    figures: Annotated[
        bool,
        typer.Option("--figures", help="Draw spectra and curves, too, as in the paper's figures 1 to 6."),
    ] = False,
) -> None:
    """Print the novel-class mIoU of finished runs: folds x fine-tuning strategies, with the mean."""
    from rich.console import Console

    from svf_lightning.analysis import tables

    console = Console()
    results = tables.read_results(runs)
    for title, grid in tables.published(results, table) if table else tables.report(results):
        console.print(title, grid, sep="\n", highlight=False)
    if figures:
        from svf_lightning.analysis import report_figures

        for path in report_figures.draw(runs, results):
            typer.echo(path)


@app.command()
@one_line_errors
def check(
    folder: Annotated[Path, typer.Argument(help="Your images, or a published data set.")],
    layout: Annotated[str, typer.Option(help="folders, indexed or coco; auto finds out.")] = "auto",
    shot: Annotated[
        int, typer.Option(help="Supports per episode; 0 for supports of `svf predict` alone.")
    ] = 1,
    sheet: Annotated[
        Path | None, typer.Option(help="The contact sheet, a PNG. [default: check_<folder>.png]")
    ] = None,
) -> None:
    """Show what is understood of a folder of images, and list everything that is wrong with it.

    Ends with status 1 if there are errors, 0 if there are none or only warnings.
    """
    from svf_lightning.own_images import check

    survey = check.check(folder, layout, shot)
    check.print_survey(survey)
    if survey.ids:
        sheet = sheet or Path(f"check_{folder.absolute().name}.png")
        check.draw_survey(survey, sheet)
        typer.echo(f"wrote {sheet}")
    raise typer.Exit(int(survey.count("error") > 0))


prepare = typer.Typer(
    help="Make the folder of a published data set from your archives.", no_args_is_help=True
)
app.add_typer(prepare, name="prepare")


@prepare.command("pascal")
@one_line_errors
def prepare_pascal(
    voc: Annotated[Path, typer.Option(help="VOCtrainval_11-May-2012.tar, or the folder VOC2012.")],
    sbd: Annotated[Path, typer.Option(help="benchmark.tgz of SBD, or the folder benchmark_RELEASE.")],
    out: Annotated[Path, typer.Option(help="The folder to make.")] = Path("datasets/VOC2012"),
) -> None:
    """Make PASCAL-5i: unpack VOC, convert SBD, merge the lists, compare with published counts."""
    from svf_lightning.data.prepare import prepare_pascal

    for count in prepare_pascal(voc, sbd, out):
        typer.echo(count)
    typer.echo(f"{out} is ready: python train.py data=pascal data.source.root={out}")


@prepare.command("coco")
@one_line_errors
def prepare_coco(
    images: Annotated[list[Path], typer.Option(help="train2014.zip, val2014.zip or folders; repeat it.")],
    annotations: Annotated[
        list[Path], typer.Option(help="annotations_trainval2014.zip or folder; repeatable.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to make.")] = Path("datasets/coco"),
    year: Annotated[str, typer.Option(help="2014 (PFENet, BAM, SVF, HSNet) or 2017 (CyCTR).")] = "2014",
) -> None:
    """Make COCO-20i: unpack images and annotations, draw the labels, compare with published counts."""
    from svf_lightning.data.prepare import prepare_coco

    for count in prepare_coco(images, annotations, out, year):
        typer.echo(count)
    typer.echo(f"{out} is ready: python train.py data=coco data.source.root={out} data.source.year={year}")


@app.command()
@one_line_errors
def convert(
    method: Annotated[
        str, typer.Argument(help="baseline, pfenet, svf_pfenet, bam, svf_bam, cyctr or hsnet.")
    ],
    checkpoint: Annotated[Path, typer.Argument(help="The official checkpoint.")],
    folder: Annotated[Path, typer.Argument(help="The run folder to write.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="More, as train.py takes it: data_dir=/data")
    ] = None,
    backbone: Annotated[str, typer.Option(help="resnet50, resnet101 or vgg16.")] = "resnet50",
    fold: Annotated[
        int, typer.Option(help="The fold it was trained for; a wrong one tests base classes.")
    ] = 0,
    shot: Annotated[int, typer.Option(help="The shots it was trained for.")] = 1,
    data: Annotated[str, typer.Option(help="The data set it was trained on.")] = "pascal",
) -> None:
    """Make a run folder of an official checkpoint, for evaluate.py and predict."""
    from svf_lightning.runs.convert import convert as write_run

    options = {"backbone": backbone, "fold": fold, "shot": shot, "data": data}
    write_run(method, checkpoint, folder, **options, overrides=overrides or [])  # type: ignore[arg-type]
    print(f"wrote {folder}; test it with: python evaluate.py run={folder}")


@app.command()
@one_line_errors
def predict(
    queries: Annotated[list[str], typer.Argument(help="Pictures: files, folders, or 'patterns/*.jpg'.")],
    support: Annotated[
        Path | None, typer.Option(help="A folder of images with masks, in a layout of `svf check`.")
    ] = None,
    support_image: Annotated[
        list[Path] | None, typer.Option(help="A support, or a folder of them; repeat it.")
    ] = None,
    support_mask: Annotated[list[Path] | None, typer.Option(help="Its mask, or the folder of masks.")] = None,
    class_name: Annotated[
        list[str] | None, typer.Option(help="What these supports show: once for all, or once for each.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A run of train.py; without one, a matcher that needs no training.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("predictions"),
    shots: Annotated[int | None, typer.Option(help="Use at most so many supports of a class.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels on a side that the network sees.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures at once.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    probabilities: Annotated[
        bool, typer.Option(help="Write how likely each pixel shows each class, too.")
    ] = False,
    trust: Trust = None,
) -> None:
    """Segment pictures by a few examples: masks, overlays and scores of every class.

    Ends with status 1 if a picture failed; the others are done all the same.
    """
    from svf_lightning.own_images.command import find_queries, predict_files, print_report
    from svf_lightning.own_images.predict import FewShotPredictor
    from svf_lightning.own_images.supports import support_pairs

    by_pairs = bool(support_image or support_mask)
    if by_pairs == (support is not None):
        raise ValueError("show what to look for: either --support, or --support-image with --support-mask")
    if class_name and not by_pairs:
        raise ValueError("--class-name goes with --support-image; --support has the names in its folders")
    files, failed = find_queries(queries, output)
    if not files:
        reasons = "; ".join(problem.sentence for problem in failed)
        raise ValueError(f"there is no picture to segment: {reasons or 'only results are there'}")
    predictor = FewShotPredictor(
        checkpoint, image_size=image_size, batch_size=batch_size, device=device, trust=trust or ()
    )
    if support is not None:
        predictor.fit(support, shots=shots)
    else:
        images, masks = support_pairs(support_image or [], support_mask or [], class_name or [])
        predictor.fit(images, masks, shots=shots)
    typer.echo(predictor.describe())
    report = predict_files(predictor, files, output, failed=failed, probabilities=probabilities)
    print_report(report, output)
    raise typer.Exit(int(bool(report["failed"] or report["not_done"])))


@app.command()
@one_line_errors
def merge(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    out: Annotated[Path, typer.Argument(help="The new run folder.")],
    trust: Trust = None,
) -> None:
    """Fold what a run trained into plain layers: a run folder without factors that predicts the same."""
    from svf_lightning.runs import export

    folded = export.merge_run(run, out, trust or ())
    typer.echo(f"folded {folded} layers; {out} is a run folder with plain weights in checkpoints/last.ckpt")


@app.command()
@one_line_errors
def export(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    singular_values: Annotated[
        Path | None,
        typer.Option(help="Write the backbone's singular values here, as safetensors; kilobytes."),
    ] = None,
    with_head: Annotated[
        bool,
        typer.Option("--with-head", help="Add the head to that file: megabytes, but all that is needed."),
    ] = False,
    onnx: Annotated[Path | None, typer.Option(help="Write an ONNX model here.")] = None,
    trust: Trust = None,
) -> None:
    """Write a run as a kilobyte file, as an ONNX model, or both.

    A kilobyte file fits the base weights that the run started from, and no others. Alone it restores the
    backbone; with the head, `svf restore` makes a run of it again.
    """
    from svf_lightning.runs import export

    if singular_values is None and onnx is None:
        raise ValueError("nothing to write; give --singular-values FILE, --onnx FILE or both")
    if with_head and singular_values is None:
        raise ValueError("--with-head belongs to --singular-values FILE, which is missing")
    if singular_values is not None:
        values = export.export_singular_values(run, singular_values, with_head, trust or ())
        size = singular_values.stat().st_size / 1000
        typer.echo(
            f"{singular_values}: {sum(map(len, values.values.values()))} singular values of "
            f"{len(values.values)} layers{' and the head' if with_head else ''}, {size:.0f} kB"
        )
    if onnx is not None:
        difference = export.export_onnx(run, onnx, trust or ())
        typer.echo(f"{onnx}: agrees with PyTorch within {difference:.0e} of the largest logit")


@app.command()
@one_line_errors
def restore(
    file: Annotated[Path, typer.Argument(help="From `svf export RUN --singular-values FILE --with-head`.")],
    out: Annotated[Path, typer.Argument(help="The new run folder.")],
    trust: Trust = None,
) -> None:
    """Make a run folder from a kilobyte file with its head, on the base weights that it was trained from."""
    from svf_lightning.runs import export

    export.restore_run(file, out, trust or ())
    typer.echo(f"{out} is a run folder; `python evaluate.py run={out}` tests it")


@app.command()
@one_line_errors
def blend(
    parts: Annotated[list[str], typer.Argument(help="FILE=WEIGHT for every file; the weights add up to 1.")],
    out: Annotated[Path, typer.Argument(help="The mixed file.")],
) -> None:
    """Mix kilobyte files of the same base weights: `svf blend cats.st=0.3 dogs.st=0.7 both.st`."""
    from svf_lightning.svf import files as singular_files

    weights: dict[str | Path, float] = {}
    for part in parts:
        file, _, weight = part.rpartition("=")
        try:
            weights[file] = weights.get(file, 0.0) + float(weight)
        except ValueError:
            raise ValueError(f"{part!r} is not FILE=WEIGHT, such as cats.st=0.3") from None
    singular_files.write(out, singular_files.blend(weights))
    typer.echo(f"{out} mixes {len(weights)} files")


benchmark = typer.Typer(help="Measure on this machine what the README quotes.", no_args_is_help=True)
app.add_typer(benchmark, name="benchmark")


@benchmark.command("data")
@one_line_errors
def benchmark_data(
    size: Annotated[int, typer.Option(help="Side of the square that the network gets.")] = 473,
    shot: Annotated[list[int], typer.Option(help="Support images per episode; repeat it.")] = [1, 5],  # noqa: B006
    images: Annotated[int, typer.Option(help="Photographs to make up.")] = 24,
    rounds: Annotated[int, typer.Option(help="Of every measurement; the fastest counts.")] = 5,
) -> None:
    """Print decoded episodes a second of one worker, where the time goes, and what other ways take."""
    from svf_lightning.benchmarks.data import run

    typer.echo(run(size, shot, images, rounds))


@benchmark.command("strategies")
@one_line_errors
def benchmark_strategies(
    strategy: Annotated[
        list[str], typer.Option(help="A file of conf/finetune; repeat it. [default: all that fit]")
    ] = [],  # noqa: B006
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 for autocast.")] = "float32",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Memory format.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Through torch.compile; minutes.")] = False,
    size: Annotated[int, typer.Option(help="Side of the images.")] = 241,
    batch: Annotated[int, typer.Option(help="Images at once.")] = 2,
    rounds: Annotated[int, typer.Option(help="Of every measurement; the fastest counts.")] = 5,
    rank: Annotated[int, typer.Option(help="Of svf_rank30.")] = 30,
) -> None:
    """Print what a training step of every strategy costs beside frozen convolutions, in time and memory."""
    from svf_lightning.benchmarks.strategies import Setting, run

    typer.echo(run(strategy, size, batch, rank, Setting(device, dtype, channels_last, compiled, rounds)))


@benchmark.command("methods")
@one_line_errors
def benchmark_methods(
    method: Annotated[list[str], typer.Option(help="Repeat it. [default: all]")] = [],  # noqa: B006
    shot: Annotated[list[int], typer.Option(help="Support images per episode; repeat it.")] = [1, 5],  # noqa: B006
    side: Annotated[int, typer.Option(help="Side of the images.")] = 129,
    batch: Annotated[int, typer.Option(help="Episodes in a step.")] = 2,
    rounds: Annotated[int, typer.Option(help="Steps to time; the fastest counts.")] = 2,
    finetune: Annotated[str, typer.Option(help="svf or frozen.")] = "svf",
) -> None:
    """Print what a training step of each method costs beside its plain transcription."""
    from svf_lightning.benchmarks.methods import METHODS, run

    for line in run(method or METHODS, shot, side, batch, rounds, finetune):
        typer.echo(line)


@benchmark.command("prior")
@one_line_errors
def benchmark_prior(
    shot: Annotated[list[int], typer.Option(help="Support images; repeat it.")] = [1, 5],  # noqa: B006
    side: Annotated[int, typer.Option(help="Side of the feature maps, in positions.")] = 60,
    channels: Annotated[int, typer.Option(help="Channels of the feature maps.")] = 2048,
) -> None:
    """Print what the prior mask costs in training, with all cosines kept and with the best ones."""
    from svf_lightning.benchmarks.prior import run

    for line in run(shot, side, channels):
        typer.echo(line)


@benchmark.command("overhead")
@one_line_errors
def benchmark_overhead(
    steps: Annotated[int, typer.Option(help="Training steps of the main job.")] = 30,
) -> None:
    """Print what Lightning, logging and checkpoints add to a training step of the main job."""
    from svf_lightning.benchmarks.overhead import run

    typer.echo(run(steps))


@one_line_errors  # for `--help`, which is no command of ours
def main() -> None:
    """Entry point of the ``svf`` command."""
    app()
