"""The commands of ``python -m oms_core``."""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from oms_core import exhibits
from oms_core.attacks import COMPARED
from oms_core.errors import InputError
from oms_core.images import inspection, open_images
from oms_core.location import Location
from oms_core.people import beside_the_paper, plain, readable
from oms_core.plain_text import Record, csv_of, visible
from oms_core.run import Run, plan, scores
from oms_core.training.recipes import RECIPES
from oms_core.writing import write_file

BENCH_PARTS = """network, engine, gradients, app, memory (by default these, some minutes), growth, cluster, scheduler,
kills (many minutes), or all"""
EPILOG = """examples:
  python -m oms_core evaluate --model ddpm-digits                      every attack, with and without OMS
  python -m oms_core evaluate --model ddpm-digits@700 --attack NA --t 200
  python -m oms_core score --model FOLDER --images FOLDER --attack PIA --out scores.parquet
  python -m oms_core verdict --model ddpm-digits --images FOLDER --attack PIA --fpr 0.01
  python -m oms_core figure D1 --model ddpm-fashion --out roc.html
  python -m oms_core evaluate --model sd-fashion --captions blip       captions written by BLIP
  python -m oms_core table 1
  python -m oms_core images member=FOLDER,nonmember=FILE.zip           what an image set holds
  python -m oms_core convert ckpt.pt --to FOLDER                       a research checkpoint as diffusers folder
  python -m oms_core convert v1-5.safetensors --to FOLDER --config DIFFUSERS_FOLDER
  python -m oms_core report --out FOLDER                               every figure and table in one file

An attack starts a search for the noise of a picture, eps^n = f(eps^(n-1)). n = 1 is the attack as published,
n = 2 adds One More Step (OMS). Larger scores mean: more likely a member of the training set.
Results are kept in .cache (or the folder in OMS_CACHE) and found again by content. OMS_DEVICE picks the device.
"""


class Parser(argparse.ArgumentParser):
    """A parser whose refusals hold nothing but text."""

    def error(self, message: str) -> NoReturn:
        super().error(visible(message))


def run_command(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it worked, 2 for bad input."""
    logging.setLogRecordFactory(Record)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what the terminal has no letter for
    options = parser().parse_args(arguments)
    try:
        options.command(options)
        sys.stdout.flush()
    except InputError as error:
        say(str(error), file=sys.stderr)
        return 2
    except OSError as error:
        return close_output(error)
    return 0


def close_output(error: OSError) -> int:
    """End after a failure to read or write that nobody expected; 0 if the reader, `head` say, has seen enough."""
    if error.filename is None:  # what is not yet printed cannot be
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return 0
    what = error.filename or "The output"
    say(f"{what} cannot be read or written ({error.strerror}); choose another place or free space.", file=sys.stderr)
    return 2


def say(*lines: str, file: Any = None) -> None:
    """Print lines that may hold names from outside; all that is printed for people goes through here."""
    print("\n".join(map(visible, lines)), file=file or sys.stdout)


def parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    top = Parser(
        "python -m oms_core",
        description="Membership inference on diffusion models as a search for the training noise.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    add_answers(commands)
    add_tools(commands)
    return top


def add_answers(commands: Any) -> None:
    """What is asked of models and pictures."""
    listing = add(commands, "list", list_command, "what there is: models, images, attacks, figures or tables")
    listing.add_argument("what", choices=list(exhibits.LISTINGS))
    listing.add_argument("--json", action="store_true", help="print JSON")

    scoring = add(commands, "score", score_command, "score every picture and write the table", run=True)
    scoring.add_argument("--out", type=Path, help="a .parquet or .csv file; by default a summary is printed")
    scoring.add_argument("--traces", type=int, default=0, help="keep the iterates of so many pictures of each kind")
    scoring.add_argument("--distances", action="store_true", help="add every d(i, j) to the table")
    add_engines(scoring)

    add(commands, "evaluate", evaluate_command, "AUC, ASR and TPR at low FPR for every n, with intervals", run=True)

    judging = add(commands, "verdict", verdict_command, "what can be said of pictures of unknown membership", run=True)
    judging.add_argument("--reference", default="", help="known pictures to compare with; by default the model's own")
    judging.add_argument("--fpr", type=float, default=0.01, help="false-alarm rate of one picture (default: 0.01)")

    drawing = add(commands, "figure", figure_command, "draw a figure of the paper", run=True)
    drawing.add_argument("name", help=f"one of {', '.join(exhibits.FIGURES)}")
    drawing.add_argument("--out", type=Path, help="an .html (self-contained), .png or .svg file")
    drawing.set_defaults(model="")  # the first built-in model of the figure's family

    tabling = add(commands, "table", table_command, "a table of the paper, its figures beside the measured", run=True)
    tabling.add_argument("name", help=f"one of {', '.join(exhibits.TABLES)}")
    tabling.set_defaults(model="")  # every built-in model of the table's family

    reporting = add(commands, "report", report_command, "every figure and table as one HTML file", run=True)
    reporting.add_argument("--out", type=Path, required=True, help="the folder to write report.html into")
    reporting.set_defaults(model="")


def add_tools(commands: Any) -> None:
    """What makes, checks and measures models and image sets."""
    training = add(commands, "train", train_command, "train a built-in model again, or check the shipped files")
    training.add_argument("name", nargs="?", help=f"one of {', '.join(RECIPES)}")
    training.add_argument("--check", action="store_true", help="compare every shipped file with its digest")
    training.add_argument("--to", type=Path, help="folder for the model; by default assets/models")
    training.add_argument("--json", action="store_true", help="print JSON")

    seeing = add(commands, "images", images_command, "what an image set holds: counts, sizes, roles, rejects")
    seeing.add_argument("name", metavar="DESCRIBE", help="digits, fashion, a folder, .zip, .parquet, or hub:owner/name")
    seeing.add_argument("--json", action="store_true", help="print JSON")

    converting = add(commands, "convert", convert_command, "make a diffusers folder of a checkpoint")
    converting.add_argument(
        "file", type=Path, help="a .pt of the pytorch-ddpm family, U-ViT's .pth, or a Stable Diffusion .safetensors"
    )
    converting.add_argument("--to", type=Path, required=True, help="the folder to make")
    converting.add_argument(
        "--config", type=Path, help="for Stable Diffusion: a diffusers folder of the same kind (weights not needed)"
    )

    assembling = add(commands, "assemble", assemble_command, "make the built-in image sets from their originals")
    assembling.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    assembling.add_argument("--to", type=Path, help="folder for the sets; by default assets/images")

    benching = add(commands, "bench", bench_command, "measure speed, model calls and memory against bare forwards")
    benching.add_argument("parts", nargs="*", metavar="PART", help=BENCH_PARTS)
    benching.add_argument("--model", default="", help="the model to measure with (default: as the targets say)")
    benching.add_argument("--pictures", type=int, help="how many are scored (default: as the targets say)")
    benching.add_argument("--dtype", default="", help="float32, float16 or bfloat16 (default: float32)")
    benching.add_argument("--mode", default="", help="eager, channels_last or compiled (default: eager)")
    benching.add_argument("--json", action="store_true", help="print JSON")
    benching.add_argument("--out", type=Path, help="draw the targets into an .html, .png or .svg file")


def add(
    commands: Any, name: str, command: Callable[[argparse.Namespace], None], help: str, run: bool = False
) -> argparse.ArgumentParser:
    """One command; with `run`, it takes a flag for each field of `Run`."""
    one = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    one.set_defaults(command=command)
    if run:
        for spec in fields(Run):
            flag = "--attack" if spec.name == "attacks" else f"--{spec.name}"
            kind = int if spec.type in ("int", "int | None") else str
            shown = "" if spec.default in (None, "", 0) else f" (default: {shown_default(spec.default)})"
            one.add_argument(flag, dest=spec.name, type=kind, default=spec.default, help=spec.metadata["help"] + shown)
        one.add_argument("--json", action="store_true", help="print JSON")
    return one


def add_engines(scoring: argparse.ArgumentParser) -> None:
    """Who computes."""
    scoring.add_argument("--engine", choices=["local", "ray"], default="local", help="this process, or a Ray cluster")
    scoring.add_argument("--workers", type=int, default=0, help="of ray: each holds a model (default: what has room)")
    scoring.add_argument("--threads", type=int, default=1, help="of each worker (default: 1)")
    scoring.add_argument("--gpus", type=float, help="of each worker, 0.5 say (default: 1 where there are any)")


def engine_of(options: argparse.Namespace) -> Any:
    """What the flags of `add_engines` name; None for this process.

    Raises:
        InputError: a number makes no sense.
    """
    if options.engine == "local":
        return None
    if options.workers < 0 or options.threads < 1 or not 0 <= (options.gpus or 0) < math.inf:
        raise InputError("--workers and --gpus cannot be negative, and --threads must be at least 1.")
    if (options.gpus or 0) > 1 and options.gpus % 1:
        raise InputError(f"--gpus is {options.gpus:g}; it must be a part of one GPU, or a whole number of them.")
    from oms_core.distributed import Cluster, compute_on

    return partial(compute_on, Cluster(options.workers, options.threads, options.gpus))


def shown_default(value: Any) -> str:
    return "all" if value == COMPARED else str(value)


def run_of(options: argparse.Namespace) -> Run:
    """The run that the flags describe."""
    values = {spec.name: getattr(options, spec.name) for spec in fields(Run)}
    if isinstance(values["attacks"], str):
        named = tuple(name.strip() for name in values["attacks"].split(",") if name.strip())
        values["attacks"] = COMPARED if named == ("all",) else named
    named = {name: Location(values[name]) for name in ("model", "images", "captioner")}
    return Run(**values | named)


class Bar:
    """Progress on standard error, shown only where somebody is looking or the work takes long."""

    def __init__(self) -> None:
        self.bar: Any = None

    def __call__(self, progress: Any) -> None:
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=progress.total, desc=progress.stage, unit="picture", file=sys.stderr, delay=1)
        self.bar.update(progress.done - self.bar.n)
        if progress.done == progress.total:
            self.bar.close()
            self.bar = None


def list_command(options: argparse.Namespace) -> None:
    rows = exhibits.listing(options.what)
    if options.json:
        print_json(rows)
    else:
        print_table(rows)


def score_command(options: argparse.Namespace) -> None:
    from oms_core.compute import score, trace

    run = run_of(options)
    planned = plan(run)
    if options.out and options.out.suffix not in (".parquet", ".csv"):
        raise InputError(f"{options.out} is neither .parquet nor .csv; name a file of one of these kinds.")
    signals = score(run, Bar(), engine_of(options))
    table = scores(planned, signals)
    if options.distances:
        distances = [signals[task.attack.name].assign(attack=task.attack.name) for task in planned.tasks]
        import pandas as pd

        table = table.merge(pd.concat(distances), on=["image", "attack"], validate="many_to_one")
    for image in first_of_each_kind(planned.images.table, options.traces):
        for attack in run.attacks:
            trace(replace(run, attacks=(attack,)), image)
    report_rejected(planned.images.rejected)
    if options.out:
        write_table(table, options.out)
        say(f"{len(table)} rows written to {options.out}", file=sys.stderr)
    if options.json:
        print_json(table.to_dict("records"))
    elif not options.out:
        summary = table.groupby(["attack", "t", "n", "member"], sort=False).score.describe()
        say(*summary.round(3).to_string().split("\n"))


def first_of_each_kind(table: Any, count: int) -> list[str]:
    """The first pictures of each role."""
    return [*table.groupby("role").head(count).image]


def report_rejected(rejected: Any) -> None:
    """Say which files were not scored."""
    for row in rejected.head(10).itertuples():
        say(f"not scored: {row.file}: {row.reason}", file=sys.stderr)
    if len(rejected) > 10:
        say(f"not scored: {len(rejected) - 10} more files", file=sys.stderr)


def write_table(table: Any, out: Path) -> None:
    """Write a table as its name says, whole or not at all.

    Raises:
        InputError: the place cannot be written.
    """
    write_file(out, table.to_parquet(index=False) if out.suffix == ".parquet" else csv_of(table).encode())


def evaluate_command(options: argparse.Namespace) -> None:
    run = run_of(options)
    rows = exhibits.evaluate(run, Bar())
    report_rejected(plan(run).images.rejected)
    if options.json:
        print_json(rows)
    else:
        print_table(readable(rows))


def verdict_command(options: argparse.Namespace) -> None:
    from oms_core import audit
    from oms_core.compute import measured

    run = run_of(options)
    if not run.images:
        raise InputError("Name the pictures in question with --images.")
    question = audit.ask(replace(run, images=Location(options.reference)), open_images(run.images), options.fpr)
    attack, bar = run.attacks[0], Bar()
    found = audit.answer(question, measured(question.known, bar)[attack], measured(question.asked, bar)[attack])
    report_rejected(question.asked.images.rejected)
    if options.json:
        print_json(audit.report(found))
        return
    rows = [{"file": row.file, "n": row.n, "says": audit.verdict_of(found, row)} for row in found.pictures.itertuples()]
    print_table(rows)
    say("", *audit.says(found))


def figure_command(options: argparse.Namespace) -> None:
    shown = exhibits.exhibit(options.name)
    out = options.out or Path(f"figure-{options.name}.html")
    check_figure(out)
    planned, chart = exhibits.figure(options.name, run_of(options), Bar())
    title = f"Figure {options.name}: {shown.title} ({planned.model.name}, {planned.images.name})"
    from oms_core.export import write_figure

    write_figure(chart, title, out)
    if options.json:
        print_json({"file": str(out), "says": chart.alt, "rows": chart.table.to_dict("records")})
    else:
        say(title, chart.alt, f"written to {out}")


def check_figure(out: Path) -> None:
    """Refuse a file that no figure can be written into.

    Raises:
        InputError: it is of another kind.
    """
    if out.suffix not in (".html", ".png", ".svg"):
        raise InputError(f"{out} is neither .html, .png nor .svg; name a file of one of these kinds.")


def table_command(options: argparse.Namespace) -> None:
    rows = exhibits.table(options.name, run_of(options), Bar())
    if options.json:
        print_json(rows)
    else:
        print_table(beside_the_paper(options.name, rows))


def report_command(options: argparse.Namespace) -> None:
    from oms_core.report import write_report

    say(f"written to {write_report(options.out, run_of(options), Bar())}")


def train_command(options: argparse.Namespace) -> None:
    if options.check == bool(options.name):
        raise InputError(f"Name what to train, one of {', '.join(RECIPES)}, or use --check to verify what is shipped.")
    if options.check:
        from oms_core.cards import check

        rows = check()
        if options.json:
            print_json(rows)
        else:
            print_table(rows)
        wrong = [row["file"] for row in rows if row["state"] != "ok"]
        if wrong:
            raise InputError(f"{len(wrong)} of {len(rows)} shipped files are not as their card says, first {wrong[0]}.")
        return
    from oms_core.training.loop import Training

    if options.name not in RECIPES:
        raise InputError(f"There is no recipe {options.name!r}; known are {', '.join(RECIPES)}.")
    say(f"written to {Training(options.name).run(options.to)}")


def images_command(options: argparse.Namespace) -> None:
    found = inspection(open_images(Location(options.name)))
    if options.json:
        print_json(found)
        return
    say(f"{found['name']}: {found['pictures']} pictures, {found['captioned']} with a caption")
    for what in ("roles", "sizes"):
        say(f"{what}: {', '.join(f'{count} {value}' for value, count in found[what].items())}")
    for reason, files in found["rejected"].items():
        say(f"rejected, {reason}: {len(files)} ({', '.join(files[:3])}{', ...' if len(files) > 3 else ''})")


def convert_command(options: argparse.Namespace) -> None:
    from oms_core.convert import convert

    made = convert(options.file, options.to, options.config)
    say(f"{options.file} is {made}; written to {options.to}")


def assemble_command(options: argparse.Namespace) -> None:
    from oms_core.assemble import assemble
    from oms_core.files import ASSETS

    for path in assemble(options.source, options.to or ASSETS / "images"):
        say(f"written to {path}")


def bench_command(options: argparse.Namespace) -> None:
    from oms_core import bench

    if options.out:
        check_figure(options.out)
    parts = options.parts or bench.QUICK
    rows = bench.bench(parts, Location(options.model), options.pictures, options.dtype, options.mode)
    if options.out:
        from oms_core.export import write_figure

        write_figure(bench.chart(rows), "Measured against targets", options.out)
    if options.json:
        print_json(rows)
    else:
        print_table(rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Rows as aligned text."""
    import pandas as pd

    texts = (
        pd.DataFrame(rows, dtype=object).fillna("").map(lambda cell: visible(cell) if isinstance(cell, str) else cell)
    )
    say(*texts.to_string(index=False).split("\n"))


def print_json(value: Any) -> None:
    """One JSON document, in which all but letters of ASCII is escaped; what is not a number is null."""
    print(json.dumps(plain(value), indent=1, allow_nan=False).replace("\x7f", "\\u007f"))
