"""CIFAR-10 with 4,000 labels, algorithms with equal numbers of FLOPs: python -m tools.studies.cifar
--src cifar10-jpeg.tar.xz --out DIR [--only NAME ...] [--compute SHARE ...] [--draws N ...]"""

import argparse
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from mpl_fast.errors import DataError, output_errors, run_command
from tools.studies import command
from tools.studies.cifar import plan
from tools.studies.cifar.plan import Cell, start_of
from tools.studies.cifar.report import draw_picture
from tools.studies.cifar.run import Study, train_all

ABOUT = """Trains the recipes configs/cifar10_4k_fast_*.yaml, and variants of them, with equal
numbers of FLOPs on several draws of the labels: cifar.json, cifar.md and cifar.png in the --out
folder. A run is as long as its FLOPs allow, and its schedules with it. The same command continues
where it was stopped; a cifar.json from elsewhere in the folder is continued too. Exit code 1: a run
failed, or Ctrl-C."""


def _share(text: str) -> Fraction:
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value <= 4:
        raise argparse.ArgumentTypeError(f"must be a share such as 1/4, at most 4, not {text!r}")
    return value


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser(prog="cifar", description=ABOUT, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--src",
        type=Path,
        required=True,
        help="CIFAR-10 as train/CLASS and test/CLASS: a folder or an archive",
    )
    add("--out", type=Path, required=True, help="folder for records, runs and results")
    add(
        "--only",
        nargs="+",
        choices=plan.BY_NAME,
        metavar="NAME",
        default=[*plan.BY_NAME],
        help="rows of the table (default: " + ", ".join(plan.BY_NAME) + ")",
    )
    add(
        "--compute",
        type=_share,
        nargs="+",
        metavar="SHARE",
        default=[*plan.SHARES],
        help=f"shares of {plan.FULL:.1e} FLOPs, about an hour on two AMX cores (1/8 1/4 1/2 1)",
    )
    add(
        "--draws",
        type=command.at_least(0),
        nargs="+",
        metavar="N",
        default=[0, 1, 2],
        help="draws of the labels, each with the seed of its number (0 1 2)",
    )
    labels = "labeled images (%(default)s)"
    add("--labels", type=command.at_least(10), default=4000, metavar="N", help=labels)
    add(
        "--jobs",
        type=command.at_least(1),
        default=1,
        metavar="N",
        help="runs side by side, each with its share of the cores (%(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains the cells that have no result yet, those of few FLOPs first."""
    options = _options(arguments)
    if not options.src.exists():
        raise DataError(f"--src {options.src} does not exist")
    study = Study(options.src, options.out, options.jobs)
    cells = [
        Cell(row, share, options.labels, draw)
        for share in sorted(set(options.compute))
        for draw in dict.fromkeys(options.draws)
        for row in plan.ROWS
        if row.name in options.only
    ]
    with output_errors(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        missing = [cell for cell in cells if not study.result(cell)]
        # Those with a result, too, that another is to continue and whose run is not here.
        starts = {cell for cell in map(start_of, missing) if cell and not study.job(cell).complete}
        waiting = [cell for cell in cells if cell in missing or cell in starts]
        print(f"{len(cells) - len(waiting)} of {len(cells)} runs have ended already", flush=True)
        if other := sorted({cell.row.name for cell in missing if study.of_other_settings(cell)}):
            print(f"not used: results of other settings of {', '.join(other)}", flush=True)
        try:
            failed = train_all(study, waiting)
        except KeyboardInterrupt:
            sys.exit("cifar: interrupted; the same command continues from what is saved")
        print(f"\n{study.write()}\n")
        files = ["cifar.json", "cifar.md"]
        if shown := [r for r in study.results if r["labels"] == options.labels]:
            try:
                draw_picture(shown, options.out)
                files.append("cifar.png")
            except ModuleNotFoundError as error:
                advice = f"{error.name} is missing: pip install {error.name}"
                print(f"no picture: {advice}", file=sys.stderr)
    print(*(options.out / name for name in files), sep="\n")
    return int(failed > 0)


if __name__ == "__main__":
    run_command("cifar", main)
