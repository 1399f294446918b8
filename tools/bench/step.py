"""Measures a whole training step: ours in several forms, beside a plain PyTorch step of MPL.

All variants have the same network, images and recipe, and take turns in one run. First they are
compared: our parity step with the plain one in float64, compiled networks with eager ones. Images
lie on the device already. Rows: times, rates, how many times faster ours is, a step's time over
that of the passes that it makes, and, measured apart, its phases and peak memory.
"""

import argparse
import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple

# Variants of different sizes share the GPU's memory.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

from mpl_fast.errors import ConfigError
from mpl_fast.training import rows as step_rows
from tools.bench import step_checks
from tools.bench.clock import interleaved, repeated, seconds_of
from tools.bench.harness import Report, run
from tools.bench.results import Row, ratios, spread
from tools.bench.step_phases import phases
from tools.bench.step_variants import (
    PLAIN,
    PLAIN_AMP,
    RECIPES,
    STEPS,
    Builder,
    Setting,
    Variant,
    add_setting_options,
    builders,
    setting_of,
)

TINY = {"model": "wrn_10_1", "labeled": 2, "mu": 2, "image_size": 16, "rounds": 1}
FEW = ["plain fp32", "plain amp", "ours fp32 eager", "ours bf16 compiled joint"]  # a smoke test's
WARM, WARM_ON_GPU = 2, 6  # steps; on a GPU until a graph of a step is captured and replayed
AT_LEAST, AT_MOST = 0.2, 20  # seconds of a turn, and steps in it
BUILT = 0.7  # of the time: no variant is begun that would not be ready by then
PHASE_ROUNDS = 3
HOPPER = ("H100", "H200")
BEST = "best of ours"
ONCE = "seconds of a step alone"
PLAIN_AIMS = {"wrn_28_2": 4.0, "resnet50": 2.5}  # times the plain step with AMP, on an H100


class Scene(NamedTuple):
    """What the targets depend on: they hold for certain machines and sizes."""

    setting: Setting
    gpu: str  # its name, or empty
    smoke: bool


class Ready(NamedTuple):
    """A variant that has run."""

    variant: Variant
    once: float  # seconds of a step alone, right after it was built
    memory: int  # bytes of the GPU at a step's peak, 0 if unknown


class Found(NamedTuple):
    """What was measured, by variant."""

    seconds: dict[str, list[float]]  # of a step, in each round
    phases: dict[str, dict[str, list[float]]]
    memory: dict[str, int]


def main(arguments: Sequence[str]) -> int:
    """See `tools.bench.harness.run`."""
    return run("step", __doc__, arguments, measure, options, rounds=7, tiny=TINY)


def options(parser: argparse.ArgumentParser) -> None:
    """Beside those of every benchmark."""
    add_setting_options(parser, "CUDA: 64, CPU: 8")
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="TEXT", help="variants with this in the name")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Correctness in float64, then the variants in turns, then their phases."""
    setting = setting_of(options, cuda=64, cpu=8)
    variants = _chosen(options, setting)
    # No compiled network may fall back to an eager one unnoticed.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    report.claim = (
        f"{setting.model}, {setting.labeled} labeled images of {setting.size} pixels and "
        f"{setting.mu} unlabeled for each, on the device already; interleaved rounds"
    )
    report.more["correctness"] = []
    _note(report, [step_checks.parity(setting)])
    found = _measured(options, setting, variants, report)
    gpu = torch.cuda.get_device_name() if setting.device.type == "cuda" else ""
    report.more[BEST] = best(found.seconds)
    report.add(rows(found, Scene(setting, gpu, options.smoke)))


def passes(setting: Setting) -> float:
    """What a step of MPL costs, in forward passes of one image; a backward pass counts 2."""
    sizes = (setting.labeled, setting.labeled * setting.mu)
    counted = step_rows.count(RECIPES["mpl"], *sizes, steps=STEPS, step=0)
    return counted.forward + 2.0 * counted.backward


def _chosen(options: argparse.Namespace, setting: Setting) -> dict[str, Builder]:
    only = options.only or (FEW if options.smoke else [""])
    every = builders(setting)
    chosen = {n: build for n, build in every.items() if any(text in n for text in only)}
    if not chosen:
        raise ConfigError(f"--only {' '.join(only)}: there are {', '.join(every)}")
    return chosen


def _note(report: Report, checks: Sequence[step_checks.Check]) -> None:
    report.more["correctness"] += [one._asdict() for one in checks]
    for one in checks:
        if one.wrong:
            report.fail(one.what, f"off by {one.error:.2g}, allowed are {one.tolerance:g}")


def _measured(
    options: argparse.Namespace, setting: Setting, variants: Mapping[str, Builder], report: Report
) -> Found:
    """The variants are built while there is time, then take turns."""
    began, seconds = time.monotonic(), report.seconds_left()
    ready = _built(variants, began + BUILT * seconds, report)
    measured = interleaved(
        ready,
        _turn,
        rounds=options.rounds,
        warmup=1,
        seed=options.seed,
        seconds=0.8 * (seconds - (time.monotonic() - began)),
    )
    for one in ready.values():
        _note(report, step_checks.compiled_logits(one.variant, setting))
    parts = dict[str, dict[str, list[float]]]()
    if report.seconds_left() > 0:
        turns = min(PHASE_ROUNDS, options.rounds)
        parts = {name: _phases(one.variant, turns) for name, one in ready.items()}
    else:
        report.skipped.append("no time: phases")
    memory = {name: one.memory for name, one in ready.items() if one.memory}
    return Found(measured, parts, memory)


def _built(variants: Mapping[str, Builder], end: float, report: Report) -> dict[str, Ready]:
    """Variants that run. After `end` none is begun, but one is always built. A step of each is
    timed and saved: all that is left if building another takes too long."""
    ready = dict[str, Ready]()
    report.more[ONCE] = {}
    for name, build in variants.items():
        if ready and time.monotonic() > end:
            report.skipped.append(f"no time: {name}")
            continue
        print(f"building {name}", flush=True)
        with report.attempt(name):  # memory or a compiler may lack
            ready[name] = _warmed(build)
            report.more[ONCE][name] = ready[name].once
            report.save()
        gc.collect()
        torch.cuda.empty_cache()
    return ready


def _warmed(build: Builder) -> Ready:
    """Runs it, so that compilers, libraries and the allocator's cache are warm."""
    gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if gpu else 0
    variant = build()
    for _ in range(WARM_ON_GPU if gpu else WARM):
        variant.step()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    once = seconds_of(variant.step)
    # What lies in a graph's own pool is not among what is allocated.
    graphed = variant.flavor is not None and variant.flavor.graphs != "off"
    memory = torch.cuda.max_memory_allocated() - before if gpu and not graphed else 0
    return Ready(variant, once, memory)


def _turn(ready: Ready) -> float:
    """Seconds of a step, out of several back to back: a wait for the GPU after each would be part
    of the number."""
    repeats = min(AT_MOST, max(1, round(AT_LEAST / ready.once)))
    return seconds_of(repeated(ready.variant.step, repeats)) / repeats


def _phases(variant: Variant, turns: int) -> dict[str, list[float]]:
    """After the timing, since it waits for the device again and again."""
    if not variant.owners or (variant.flavor and variant.flavor.graphs == "step"):
        return {}  # a graph of a whole step calls no method
    found = [phases(variant.step, variant.owners) for _ in range(turns + 1)][1:]
    return {name: [turn.get(name, 0.0) for turn in found] for name in found[0]}


def best(seconds: Mapping[str, list[float]], only: str = "ours") -> str | None:
    """The variant with the shortest step of those whose name begins so."""
    mine = [name for name in seconds if name.startswith(only)]
    return min(mine, key=lambda name: median(seconds[name]), default=None)


def rows(found: Found, scene: Scene) -> list[Row]:
    """Times, ratios, phases and memory, with the project's aims."""
    aims = targets(scene, best(found.seconds) or "no step of ours")
    return [
        row._replace(
            name=f"mpl, {row.name}",
            steady=row.steady and not scene.smoke,
            target=next((aim for end, aim in aims.items() if row.name.endswith(end)), None),
        )
        for row in (*_times(found, scene.setting), *_ratios(found.seconds, scene))
    ]


def targets(scene: Scene, first: str) -> dict[str, float]:
    """Aims by the end of a row's name; `first` is the fastest of ours."""
    setting, model = scene.setting, scene.setting.model
    if scene.smoke:
        return {}
    if not scene.gpu:
        aims = {f"{PLAIN} / {BEST}": 2.5, f"{PLAIN} / {BEST} in fp32": 1.3}
        return aims if model == "wrn_28_2" else {}
    if not any(name in scene.gpu for name in HOPPER):
        return {}
    found = {" / split": 1.25, " passes": 1.05}
    if model in PLAIN_AIMS:
        found[f"{PLAIN_AMP} / {BEST}"] = PLAIN_AIMS[model]
    if setting[:4] == ("wrn_28_2", 64, 7, 32):
        found[f"{first}: step"] = 15.0
    if (model, setting.mu) == ("resnet50", 7):
        found[f"{first}: distinct images"] = 1000.0
    return found


def _times(found: Found, setting: Setting) -> Iterator[Row]:
    for name, times in found.seconds.items():
        yield Row(f"{name}: step", spread([1e3 * s for s in times]), "ms")
        rates = spread([setting.distinct / s for s in times])
        what = "images" if name.startswith("one pass") else "distinct images"
        yield Row(f"{name}: {what}", rates, "img/s", "higher")
    for name, parts in found.phases.items():
        for phase, times in parts.items():
            yield Row(f"{name}, phase: {phase}", spread([1e3 * s for s in times]), "ms")
    for name, peak in found.memory.items():
        yield Row(f"{name}: peak memory", spread([peak / 1e9]), "GB")


def _ratios(seconds: Mapping[str, list[float]], scene: Scene) -> Iterator[Row]:
    """How many times faster than the plain step, split than joint; a step beside its passes."""

    def speedup(slow: str, fast: str, name: str = "") -> Row:
        found = ratios(seconds, slow, fast)
        return Row(name or f"{slow} / {fast}", found, "x", "higher", steady=True)

    ours = [name for name in seconds if name.startswith("ours")]
    fastest, in_fp32 = best(seconds), best(seconds, "ours fp32 compiled")
    for plain in (PLAIN, PLAIN_AMP):
        if plain in seconds and fastest:
            yield from (speedup(plain, name) for name in ours)
            yield speedup(plain, fastest, f"{plain} / {BEST}")
    if PLAIN in seconds and in_fp32:
        yield speedup(PLAIN, in_fp32, f"{PLAIN} / {BEST} in fp32")
    for name in ours:
        how, _, kind = name.removeprefix("ours ").rpartition(" ")
        joint, alone = f"ours {how} joint", seconds.get(f"one pass {how}")
        if kind == "split" and joint in seconds:
            yield speedup(joint, name, f"{joint} / split")
        if kind == "joint" and alone is not None:
            whole = passes(scene.setting)
            # Those of the supervised step beside it: three an image.
            share = 3.0 * scene.setting.distinct / whole
            found = [share * t / s for t, s in zip(seconds[name], alone, strict=True)]
            yield Row(f"{name}: step / its {whole:.0f} passes", spread(found), "x", steady=True)
