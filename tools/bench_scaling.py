"""Measures how the step of Meta Pseudo Labels scales over ranks, each with a batch of its own.

torchrun starts 1, 2, 4, ... ranks: on GPUs with NCCL, on a CPU with gloo and one thread a rank. The
numbers of ranks take turns. Efficiency is the rate of a rank among others over that of one by
itself. The exchange's share is what a step takes longer than without it on as many busy ranks.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import os
import random
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch

from mpl_fast.config.command_line import fail
from mpl_fast.errors import ConfigError, UserError
from tools.bench import report
from tools.bench.clock import spread
from tools.bench.device import NAMES, chosen
from tools.bench.report import Row
from tools.bench_steps.ranks import ALONE, TOGETHER, timed
from tools.bench_steps.setting import Setting, default_size, network

Json = dict[str, Any]
Times = dict[int, dict[str, list[float]]]  # seconds of steps, by the number of ranks
EFFICIENCY = 0.95  # what is wanted of GPUs in one machine


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1: nothing could be measured. 2: an option that cannot be."""
    options = _options(arguments)
    try:
        setting, counts = _setting(options)
        report.prepare(options.out)
        network(setting)  # a wrong name is told here, not by every rank
        found, skipped = _measured(options, setting, counts)
        claim = "steps of the slowest rank; numbers of ranks took turns"
        result = report.result("bench_scaling", options, claim, rows(found, setting, options.smoke))
        report.write(result | {"skipped": skipped}, options.out)
    except UserError as error:
        fail("bench_scaling", error)
    print(report.table(result["rows"]))
    for line in skipped:
        print(f"left out: {line}")
    return int(not found)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default="wrn_28_2", metavar="NAME", help="any that mpl_fast knows (%(default)s)")
    add("--labeled", type=int, metavar="N", help="labeled images of a rank (CUDA: 64, CPU: 4)")
    add("--mu", type=int, default=7, metavar="N", help="unlabeled for each of them (%(default)s)")
    add("--device", choices=NAMES, default="auto", help="(%(default)s)")
    add("--ranks", type=int, nargs="+", metavar="N", help="(1 2 4 ... all GPUs, or all cores)")
    add("--steps", type=int, default=5, metavar="N", help="in a round (%(default)s)")
    report.add_options(parser, "bench_scaling", rounds=3)
    return parser.parse_args(arguments)


def _setting(options: argparse.Namespace) -> tuple[Setting, list[int]]:
    device = chosen(options.device)
    cuda = device.type == "cuda"
    have = torch.cuda.device_count() if cuda else len(os.sched_getaffinity(0))
    counts = sorted({*(options.ranks or _doubled(have))})
    if options.smoke:
        # Two ranks on a CPU, on however few cores.
        options.rounds, options.steps, options.ranks = 1, 2, [min(2, have) if cuda else 2]
        return Setting("wrn_10_1", 2, 2, 16, device), options.ranks
    labeled = options.labeled
    if labeled is None:
        labeled = 64 if cuda else 4
    if min(labeled, options.mu, options.rounds, options.steps, *counts) < 1:
        raise ConfigError("--labeled, --mu, --ranks, --rounds and --steps must be 1 or more")
    if cuda and counts[-1] > have:
        raise ConfigError(f"--ranks {counts[-1]}: there are {have} GPUs here")
    return Setting(options.model, labeled, options.mu, default_size(options.model), device), counts


def _doubled(have: int) -> list[int]:
    return [*(1 << n for n in range(have.bit_length()) if 1 << n < have), have]


def _measured(
    options: argparse.Namespace, setting: Setting, counts: list[int]
) -> tuple[Times, list[str]]:
    deadline = time.monotonic() + 60.0 * (options.minutes or 1e6)
    order, found, skipped = random.Random(options.seed), Times(), list[str]()
    for number in range(options.rounds):
        for ranks in order.sample(counts, len(counts)):
            left = deadline - time.monotonic()
            if left <= 0:
                skipped.append(f"no time: {ranks} ranks, round {number + 1}")
                continue
            print(f"{ranks} ranks, round {number + 1}", flush=True)
            try:
                times = timed(setting, ranks, options.steps, min(left, 1e5))
            except RuntimeError as error:
                skipped.append(str(error))
                continue
            mine = found.setdefault(ranks, {name: [] for name in times})
            for name, seconds in times.items():
                mine[name] += seconds
    return found, skipped


def rows(
    found: Mapping[int, Mapping[str, list[float]]], setting: Setting, smoke: bool
) -> list[Row]:
    """Rates, efficiencies and shares, by the number of ranks."""
    made, one = list[Row](), found.get(1)
    wanted = EFFICIENCY if setting.device.type == "cuda" and not smoke else None
    for ranks, times in sorted(found.items()):
        name, together = f"{ranks} rank{'s' if ranks > 1 else ''}", times[TOGETHER]
        rates = [ranks * setting.distinct / s for s in together]
        made.append(Row(f"{name}: step", spread([1e3 * s for s in together]), "ms"))
        made.append(Row(f"{name}: distinct images", spread(rates), "img/s", "higher"))
        if one and ranks > 1:
            alone = median(one[TOGETHER])
            share = spread([alone / s for s in together])
            made.append(Row(f"{name}: efficiency", share, "", "higher", target=wanted))
        if ranks > 1:
            exchange = spread([1.0 - 1.0 / r for r in _ratios(times)])
            made.append(Row(f"{name}: share of the exchange", exchange, ""))
    return made


def _ratios(times: Mapping[str, list[float]]) -> list[float]:
    """How much longer a step takes than one that exchanges nothing."""
    return [t / a for t, a in zip(times[TOGETHER], times[ALONE], strict=True)]


if __name__ == "__main__":
    raise SystemExit(main())
