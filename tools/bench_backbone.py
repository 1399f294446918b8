"""Measures how fast networks train by themselves: forward, cross-entropy and backward of synthetic
images, eager and compiled, in both layouts and precisions, in turns.

Shares are of the limits that are measured in the same run: for images a second whichever is lower,
arithmetic (a large matrix product) or memory (a large copy, over the bytes that an image has to
move; small networks may keep some of them in a cache). Each contestant's loss and gradient norm are
compared with the first one's before anything is timed. `--smoke` runs a tiny network once.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import time
from collections.abc import Sequence

import torch

from mpl_fast import models
from mpl_fast.errors import ConfigError, UserError
from tools.bench.device import NAMES, chosen
from tools.bench.report import Json, add_options, prepare, result, table, write
from tools.bench_losses.capture import DeviceLostError
from tools.bench_nets.contestants import BASE, Contestant, contestants
from tools.bench_nets.measure import Outcome, measure
from tools.bench_nets.rows import limits, told
from tools.bench_nets.setting import Setting, setting

TINY = {"models": ["wrn_10_1"], "batch": 4, "image_size": 32, "rounds": 1, "steps": 1}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1: a contestant failed or is wrong. 2: an option is wrong."""
    options = _options(arguments)
    try:
        outcome = _measured(options)
    except UserError as error:
        print(f"bench_backbone: {error}", file=sys.stderr)
        return 2
    except DeviceLostError as lost:
        print(f"bench_backbone: {lost}; {options.out} has the networks before", file=sys.stderr)
        return 1
    for name, why in outcome.failed.items():
        print(f"FAILED: {name}: {why}")
    return int(bool(outcome.failed))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    names = ["resnet50", "wrn_28_2"]
    add("--models", nargs="+", default=names, metavar="NAME", help="(resnet50 wrn_28_2)")
    add("--batch", type=int, metavar="N", help="images (GPU 256, or 512 small ones; CPU 16, 64)")
    add("--image-size", type=int, metavar="N", help="(32 for the networks for CIFAR, else 224)")
    add("--device", choices=NAMES, default="auto", help="(%(default)s)")
    add("--steps", type=int, metavar="N", help="of one measurement (GPU 10, CPU 1)")
    add("--only", default="", metavar="TEXT", help="the first contestant and those so named")
    add("--max-autotune", action="store_true", help="also this mode, which compiles for minutes")
    add_options(parser, "bench_backbone", rounds=10)
    return parser.parse_args(arguments)


def _measured(options: argparse.Namespace) -> Outcome:
    """Network after network; the file is written after each, the table printed at the end."""
    began = time.perf_counter()
    if options.smoke:
        vars(options).update(TINY)
    device = chosen(options.device)
    options.device = device.type
    asked = [_setting(options, model, device) for model in options.models]
    torch.manual_seed(options.seed)
    networks = [models.build(one.model, one.classes) for one in asked]
    who = _contestants(options, device)
    prepare(options.out)
    found = limits(device, small=options.smoke)
    outcome = Outcome([], {})
    for number, (one, network) in enumerate(zip(asked, networks, strict=True)):
        left = 60.0 * (options.minutes or float("inf")) - (time.perf_counter() - began)
        more = measure(one, network, who, found, left / (len(asked) - number))
        outcome = Outcome(outcome.rows + more.rows, outcome.failed | more.failed)
        written = {**_result(options, outcome), "limits": told(found)}
        write(written, options.out)
    print(written["claim"])
    print(table(written["rows"]))
    print("; ".join(f"{name}: {one['high']:.3g}" for name, one in told(found).items()))
    print(f"written: {options.out}")
    return outcome


def _setting(options: argparse.Namespace, model: str, device: torch.device) -> Setting:
    return setting(
        model,
        device,
        image_size=options.image_size,
        batch=options.batch,
        steps=options.steps,
        rounds=options.rounds,
        seed=options.seed,
    )


def _contestants(options: argparse.Namespace, device: torch.device) -> list[Contestant]:
    every = contestants(device, tuned=options.max_autotune)
    who = [one for one in every if one == BASE or options.only in one.name]
    if options.only and len(who) == 1 and options.only not in BASE.name:
        names = "; ".join(one.name for one in every)
        raise ConfigError(f"--only {options.only!r} is in none of: {names}")
    return who


def _result(options: argparse.Namespace, outcome: Outcome) -> Json:
    claim = (
        f"training steps of the networks alone, median of at most {options.rounds} interleaved "
        "rounds; the share of a limit is that of what this machine did in the same run"
    )
    return {**result("bench_backbone", options, claim, outcome.rows), "failed": outcome.failed}


if __name__ == "__main__":
    raise SystemExit(main())
