"""Measures what a user waits for: --help, imports, and the first step, compiled cold and warm.

Each number is of a process of its own, from its start. A first step ends when its row of metrics is
written. Cold: nothing has been compiled before. Warm: another run directory, with the compile
caches that the cold run left. Resume: the warm run goes on from its checkpoint, for one step more.
`--smoke` takes a tiny network.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import tempfile
import time
from collections.abc import Sequence

from mpl_fast.errors import UserError
from tools.bench.clock import interleaved, spread
from tools.bench.device import NAMES, chosen
from tools.bench.report import Row, add_options, prepare, publish, result
from tools.bench_starts.processes import FailedError, Starts, generated

TINY = {"model": "wrn_10_1", "recipe": "supervised", "labeled": 4, "unlabeled": 4, "rounds": 1}
HELP = 0.5  # seconds
STEPS = ("not compiled", "cold", "warm", "resume")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1: a process failed. 2: an option is wrong."""
    options = _options(arguments)
    if options.smoke:
        vars(options).update(TINY)
    try:
        options.device = chosen(options.device).type
        prepare(options.out)
        with tempfile.TemporaryDirectory() as folder:
            rows = _measured(options, Path(folder))
    except UserError as error:
        print(f"bench_startup: {error}", file=sys.stderr)
        return 2
    except FailedError as error:
        print(f"bench_startup: {error}", file=sys.stderr)
        return 1
    claim = f"median of up to {options.rounds} rounds, each number of a process of its own"
    publish(result("bench_startup", options, claim, rows), options.out)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--model", default="wrn_28_2", metavar="NAME", help="(%(default)s)")
    add("--recipe", default="mpl", metavar="NAME", help="(%(default)s)")
    add("--labeled", type=int, default=16, metavar="N", help="images in a step (%(default)s)")
    add("--unlabeled", type=int, default=32, metavar="N", help="images in a step (%(default)s)")
    add("--image-size", type=int, default=32, metavar="N", help="(%(default)s)")
    add("--compile", choices=("default", "max-autotune"), default="default", help="(%(default)s)")
    add("--device", choices=NAMES, default="auto", help="(%(default)s)")
    add_options(parser, "bench_startup", rounds=3)
    return parser.parse_args(arguments)


def _measured(options: argparse.Namespace, folder: Path) -> list[Row]:
    began = time.perf_counter()
    starts = Starts(options, folder, generated(folder, options.labeled, options.unlabeled))
    light = interleaved(
        {
            "--help": starts.help,
            "parse": starts.parse,
            "import torch": starts.import_torch,
            "import the trainer": starts.import_trainer,
        },
        rounds=options.rounds,
        warmup=0 if options.smoke else 1,
        seed=options.seed,
    )
    first: dict[str, list[float]] = {name: [] for name in STEPS}
    for number in range(options.rounds):
        if number and time.perf_counter() - began > 60.0 * (options.minutes or float("inf")):
            break
        for name, seconds in starts.first_steps(number).items():
            first[name].append(seconds)
    return _rows(light, first)


def _rows(light: dict[str, list[float]], first: dict[str, list[float]]) -> list[Row]:
    found = {name: spread(seconds) for name, seconds in (light | first).items()}
    floor, plain = found["import torch"].median, found["not compiled"].median
    return [
        Row("--help", found["--help"], "s", target=HELP),
        Row("parse a command line", found["parse"], "s", target=HELP),
        Row("import torch", found["import torch"], "s"),
        Row("import the trainer", found["import the trainer"], "s", limit=floor),
        Row("first step, not compiled", found["not compiled"], "s"),
        Row("first step, compiled cold", found["cold"], "s", limit=plain),
        Row("first step, compiled warm", found["warm"], "s", limit=plain),
        Row("resume to the next step, warm", found["resume"], "s", limit=plain),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
