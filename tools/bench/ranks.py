"""Measures how the step of Meta Pseudo Labels scales over ranks, each with a batch of its own.

torchrun starts 1, 2, 4, ... ranks: on GPUs with NCCL, on a CPU with gloo and one thread a rank. The
numbers of ranks take turns. Efficiency is the rate of a rank among others over that of one by
itself. The exchange's share is what a step takes longer than without it on as many busy ranks.
Exit code 1: nothing could be measured.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from unittest import mock

import torch
import torch.distributed as dist

from mpl_fast import distributed
from mpl_fast.errors import ConfigError
from mpl_fast.training.process import die_with_launcher
from tools.bench import step_variants
from tools.bench.clock import Work, interleaved, wait_for_gpu
from tools.bench.harness import Report, at_least, run
from tools.bench.results import Row, spread
from tools.bench.step_variants import Flavor, Setting, add_setting_options, setting_of
from tools.bench.torchrun import RanksError, arguments_of, on_ranks

TINY: dict[str, object] = {"model": "wrn_10_1", "labeled": 2, "mu": 2, "image_size": 16}
TINY |= {"rounds": 1, "steps": 2}
EFFICIENCY = 0.95  # target for GPUs in one machine
WARM = 3
TOGETHER, ALONE = "together", "alone"
Times = dict[str, list[float]]  # seconds of the slowest rank's steps, together and alone


def main(arguments: Sequence[str]) -> int:
    """See `tools.bench.harness.run`."""
    return run("ranks", __doc__, arguments, measure, options, rounds=3, tiny=TINY)


def options(parser: argparse.ArgumentParser) -> None:
    """Beside those of every benchmark."""
    add_setting_options(parser, "CUDA: 64, CPU: 4")
    add, number = parser.add_argument, at_least(1)
    add("--ranks", type=number, nargs="+", metavar="N", help="(1 2 4 ... all GPUs, or all cores)")
    add("--steps", type=number, default=5, metavar="N", help="in a round (%(default)s)")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Round after round; in each all numbers of ranks, in an order drawn anew."""
    setting = setting_of(options, cuda=64, cpu=4)
    cuda = setting.device.type == "cuda"
    have = torch.cuda.device_count() if cuda else len(os.sched_getaffinity(0))
    if options.smoke:  # two ranks on a CPU, on however few cores
        options.ranks = [min(2, have) if cuda else 2]
    options.ranks = sorted({*(options.ranks or doubled(have))})
    if cuda and options.ranks[-1] > have:
        raise ConfigError(f"--ranks {options.ranks[-1]}: there are {have} GPUs here")
    report.claim = "steps of the slowest rank; numbers of ranks took turns"
    found: dict[int, Times] = {}

    def timed(ranks: int) -> None:
        print(f"{ranks} ranks", flush=True)
        try:
            times = on_ranks("tools.bench.ranks", ranks, setting, [str(options.steps)])
        except RanksError as error:
            report.skipped.append(str(error))
        else:
            earlier = found.setdefault(ranks, {TOGETHER: [], ALONE: []})
            found[ranks] = {key: earlier[key] + times[key] for key in earlier}

    report.interleaved({str(ranks): ranks for ranks in options.ranks}, timed, warmup=0)
    if not found:
        report.fail("all numbers of ranks", "nothing could be measured")
    report.add(rows(found, setting, options.smoke))


def doubled(have: int) -> list[int]:
    """1, 2, 4, ... and all."""
    return [*(1 << n for n in range(have.bit_length()) if 1 << n < have), have]


def rows(found: Mapping[int, Times], setting: Setting, smoke: bool) -> list[Row]:
    """Rates, efficiencies and shares, by the number of ranks."""
    made, one = list[Row](), found.get(1)
    target = EFFICIENCY if setting.device.type == "cuda" and not smoke else None
    for ranks, times in sorted(found.items()):
        name, together = f"{ranks} rank{'s' if ranks > 1 else ''}", times[TOGETHER]
        rates = [ranks * setting.distinct / s for s in together]
        made.append(Row(f"{name}: step", spread([1e3 * s for s in together]), "ms"))
        made.append(Row(f"{name}: distinct images", spread(rates), "img/s", "higher"))
        if one and ranks > 1:
            alone = median(one[TOGETHER])
            share = spread([alone / s for s in together])
            made.append(Row(f"{name}: efficiency", share, "", "higher", target=target))
        if ranks > 1:
            pairs = zip(together, times[ALONE], strict=True)
            exchange = spread([1.0 - alone / s for s, alone in pairs])
            made.append(Row(f"{name}: share of the exchange", exchange, ""))
    return made


def rank(given: Sequence[str]) -> None:
    """On one rank: times steps with the others, and without any exchange; rank 0 writes.

    All ranks work at the same time in either case, so that their difference is the exchange and
    the waiting for the slowest, and not what they take from each other of memory or cores. A step
    takes as long as its slowest rank.
    """
    die_with_launcher()
    dist_env = distributed.init(given[5])
    torch.backends.cudnn.benchmark = True
    out, setting, (steps,) = arguments_of(given, dist_env.device)
    works = {TOGETHER: _step(setting), ALONE: without_exchange(_step, setting)}
    # The seed is alike on all ranks, and with it the order.
    found = interleaved(works, _seconds, rounds=int(steps), warmup=WARM)
    slowest = {name: _slowest(times) for name, times in found.items()}
    if dist_env.is_rank0:
        out.write_text(json.dumps(slowest))
    distributed.shutdown()


def without_exchange(make: Callable[[Setting], Work], setting: Setting) -> Work:
    """The step of a process that has no others."""

    @contextmanager
    def no_others() -> Iterator[None]:
        with mock.patch.object(dist, "is_initialized", return_value=False):
            yield

    with no_others():
        step = make(setting)
    return no_others()(step)


def _step(setting: Setting) -> Work:
    return step_variants.ours(setting, "mpl", Flavor(bf16=setting.device.type == "cuda")).step


def _seconds(work: Work) -> float:
    """Begun by all ranks at once."""
    wait_for_gpu()
    distributed.barrier()
    began = time.perf_counter()
    work()
    wait_for_gpu()
    return time.perf_counter() - began


def _slowest(times: list[float]) -> list[float]:
    return [max(turn) for turn in zip(*distributed.all_gather_object(times), strict=True)]


if __name__ == "__main__":
    rank(sys.argv[1:])
