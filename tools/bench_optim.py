"""Measures what follows a backward pass: clipping, SGD with Nesterov momentum, the moving average;
per tensor, by lists, fused, and as training does it.

All end at the same weights within 1e-5, which is checked first. Time is that of tails back to back,
so on a GPU the host's as long as the host is the slower one. The limit is the time in which this
machine, in the same run, copies the bytes that no tail can avoid to move. `--smoke` takes a tiny
network.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import time
from collections.abc import Sequence

from mpl_fast.errors import ConfigError, UserError
from tools.bench.device import NAMES, chosen
from tools.bench.limits import copies
from tools.bench.report import Json, add_options, prepare, result, table, write
from tools.bench_tails.measure import Outcome, measure
from tools.bench_tails.problem import problem

TINY = {"models": ["wrn_10_1"], "rounds": 2, "steps": 1}
STEPS = {"cpu": 1, "cuda": 20}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1: a contestant failed or is wrong. 2: an option is wrong."""
    options = _options(arguments)
    try:
        outcome = _measured(options)
    except UserError as error:
        print(f"bench_optim: {error}", file=sys.stderr)
        return 2
    for name, why in outcome.failed.items():
        print(f"FAILED: {name}: {why}")
    return int(bool(outcome.failed))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    names = ["resnet50", "wrn_28_2"]
    add("--models", nargs="+", default=names, metavar="NAME", help="(resnet50 wrn_28_2)")
    add("--device", choices=NAMES, default="auto", help="(%(default)s)")
    add("--steps", type=int, metavar="N", help="of one measurement (GPU 20, CPU 1)")
    add_options(parser, "bench_optim", rounds=20)
    return parser.parse_args(arguments)


def _measured(options: argparse.Namespace) -> Outcome:
    """Network after network; the file is written after each, the table printed at the end."""
    began = time.perf_counter()
    if options.smoke:
        vars(options).update(TINY)
    device = chosen(options.device)
    options.device = device.type
    options.steps = STEPS[device.type] if options.steps is None else options.steps
    for name, given in (("steps", options.steps), ("rounds", options.rounds)):
        if given < 1:
            raise ConfigError(f"--{name} {given} is too small: give at least 1")
    problems = [problem(model, device, options.seed) for model in options.models]
    prepare(options.out)
    copied = copies(device, small=options.smoke)
    outcome = Outcome([], {})
    for number, one in enumerate(problems):
        left = 60.0 * (options.minutes or float("inf")) - (time.perf_counter() - began)
        more = measure(
            one,
            steps=options.steps,
            rounds=options.rounds,
            seed=options.seed,
            bytes_per_second=copied.high,
            seconds=left / (len(problems) - number),
        )
        outcome = Outcome(outcome.rows + more.rows, outcome.failed | more.failed)
        written = {**_result(options, outcome), "limits": {"copy, bytes/s": copied._asdict()}}
        write(written, options.out)
    print(written["claim"])
    print(table(written["rows"]))
    print(f"copy, GB/s: {copied.high / 1e9:.3g}")
    print(f"written: {options.out}")
    return outcome


def _result(options: argparse.Namespace, outcome: Outcome) -> Json:
    claim = (
        f"one tail, median of at most {options.rounds} interleaved rounds of {options.steps} back "
        "to back; the share of the limit is that of a copy's speed in the same run"
    )
    return {**result("bench_optim", options, claim, outcome.rows), "failed": outcome.failed}


if __name__ == "__main__":
    raise SystemExit(main())
