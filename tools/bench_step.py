"""Measures a whole training step: ours against a plain re-statement of the public code's.

All contestants have the same network, images and recipe, and take turns in one run. First they are
compared: our parity step with the plain one in float64, compiled networks with eager ones. Images
lie on the device already. Rows: times, rates, how many times faster ours is, a step's time over
that of the passes that it makes, and, measured apart, its phases and peak memory.
`--smoke` runs everything once at a tiny size and claims nothing about speed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import os
import time
from collections.abc import Sequence
from typing import Any

# Contestants of different sizes share the GPU's memory.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

from mpl_fast.config.command_line import fail
from mpl_fast.errors import ConfigError, UserError
from tools.bench import report
from tools.bench.device import NAMES, chosen
from tools.bench_steps import correctness
from tools.bench_steps.measure import Found, entrants, measure
from tools.bench_steps.passes import forward_count
from tools.bench_steps.rows import BEST, Scene, best, rows
from tools.bench_steps.setting import RECIPES, Setting, default_size

Json = dict[str, Any]
FEW = ("plain fp32", "plain amp", "ours fp32 eager", "ours bf16 compiled joint")  # a smoke test's


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1: a contestant computes something else. 2: an option that cannot be."""
    options = _options(arguments)
    try:
        setting = _setting(options)
        report.prepare(options.out)
        # No compiled network may fall back to an eager one unnoticed.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        found = _measured(options, setting)
    except UserError as error:
        fail("bench_step", error)
    print(report.table(found["rows"]))
    for line in found["skipped"]:
        print(f"left out: {line}")
    wrong = [row for row in found["correctness"] if row["wrong"]]
    for row in wrong:
        text = f"bench_step: wrong: {row['what']}: {row['error']:.2g}, limit {row['tolerance']:g}"
        print(text, file=sys.stderr)
    return int(bool(wrong))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default="wrn_28_2", metavar="NAME", help="any that mpl_fast knows (%(default)s)")
    add("--labeled", type=int, metavar="N", help="labeled images in a step (CUDA: 64, CPU: 8)")
    add("--mu", type=int, default=7, metavar="N", help="unlabeled for each of them (%(default)s)")
    add("--image-size", type=int, metavar="N", help="pixels (what the network is made for)")
    add("--device", choices=NAMES, default="auto", help="(%(default)s)")
    add(
        "--recipe", nargs="+", default=["mpl"], choices=tuple(RECIPES), metavar="NAME", help="(mpl)"
    )
    add("--compile", default="default", choices=("default", "max-autotune"), help="(%(default)s)")
    add("--only", nargs="+", default=[], metavar="TEXT", help="contestants with this in the name")
    report.add_options(parser, "bench_step", rounds=7)
    return parser.parse_args(arguments)


def _setting(options: argparse.Namespace) -> Setting:
    device = chosen(options.device)
    if options.smoke:
        return Setting("wrn_10_1", 2, 2, 16, device)
    labeled = options.labeled
    if labeled is None:
        labeled = 64 if device.type == "cuda" else 8
    size = default_size(options.model) if options.image_size is None else options.image_size
    if min(labeled, options.mu, size, options.rounds) < 1:
        raise ConfigError("--labeled, --mu, --image-size and --rounds must be 1 or more")
    return Setting(options.model, labeled, options.mu, size, device)


def _measured(options: argparse.Namespace, setting: Setting) -> Json:
    """Recipe after recipe; the file is written after each, so that a kill loses one of them."""
    deadline = time.perf_counter() + 60.0 * (options.minutes or 1e6)
    gpu = torch.cuda.get_device_name() if setting.device.type == "cuda" else ""
    made: list[report.Row] = []
    more: Json = {"correctness": [correctness.parity(setting)], "skipped": [], BEST: {}}
    result: Json = {}
    for number, recipe in enumerate(options.recipe):
        left = (deadline - time.perf_counter()) / (len(options.recipe) - number)
        found = _recipe(options, setting, recipe, left)
        forwards = forward_count(recipe, RECIPES[recipe], setting.labeled, setting.mu)
        made += rows(found, Scene(setting, recipe, forwards, gpu, options.smoke))
        more["correctness"] += found.checked
        more["skipped"] += [f"{recipe}: {line}" for line in found.skipped]
        more[BEST][recipe] = best(found)
        result = report.result("bench_step", options, _claim(setting), made) | more
        report.write(result, options.out)
    return result


def _recipe(options: argparse.Namespace, setting: Setting, recipe: str, seconds: float) -> Found:
    only = options.only or (FEW if options.smoke else ("",))
    names = [name for name, _ in entrants(setting, recipe, options.compile)]
    if not any(text in name for text in only for name in names):
        raise ConfigError(f"--only {' '.join(only)}: there are {', '.join(names)}")
    return measure(
        setting,
        recipe,
        lambda name: any(text in name for text in only),
        rounds=1 if options.smoke else options.rounds,
        seed=options.seed,
        seconds=seconds,
        compiled=options.compile,
    )


def _claim(setting: Setting) -> str:
    return (
        f"{setting.model}, {setting.labeled} labeled images of {setting.size} pixels and "
        f"{setting.mu} unlabeled for each, on the device already; interleaved rounds"
    )


if __name__ == "__main__":
    raise SystemExit(main())
