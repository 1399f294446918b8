"""Measures a whole training step: ours in several forms, beside a plain PyTorch step of MPL.

All variants have the same network, images and recipe, and take turns in one run. First they are
compared: our parity step with the plain one in float64, compiled networks with eager ones. Images
lie on the device already. Rows: times, rates, how many times faster ours is, a step's time over
that of the passes that it makes, and, measured apart, its phases and peak memory.
"""

import argparse
import gc
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

# Variants of different sizes share the GPU's memory.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

from mpl_fast.dry_run import rows as step_rows
from mpl_fast.errors import ConfigError
from tools.bench import step_checks
from tools.bench.clock import interleaved, repeated, seconds_of
from tools.bench.harness import Report, run
from tools.bench.results import Row, one_line, ratios, spread
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
    batch,
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


class Scene(NamedTuple):
    """What the targets depend on: they hold for certain machines and sizes."""

    setting: Setting
    recipe: str
    passes: float  # forward passes of one image that a step costs
    gpu: str  # its name, or empty
    smoke: bool

    @property
    def hopper(self) -> bool:
        """Whether the targets for an H100 hold."""
        return not self.smoke and self.recipe == "mpl" and any(n in self.gpu for n in HOPPER)

    @property
    def on_cpu(self) -> bool:
        """Whether the targets for a CPU hold."""
        return not self.smoke and not self.gpu and self.setting.model == "wrn_28_2"


class Ready(NamedTuple):
    """A variant that has run."""

    variant: Variant
    repeats: int  # steps in a turn
    memory: int  # bytes of the GPU at a step's peak, 0 if unknown
    metrics: dict[str, float]  # of its last warm step


class Found(NamedTuple):
    """What was measured of a recipe, by variant."""

    seconds: dict[str, list[float]]  # of a step, in each round
    phases: dict[str, dict[str, list[float]]]
    memory: dict[str, int]


def main(arguments: Sequence[str]) -> int:
    """See `tools.bench.harness.run`."""
    return run("step", __doc__, arguments, measure, options, rounds=7, tiny=TINY)


def options(parser: argparse.ArgumentParser) -> None:
    """Beside those of every benchmark."""
    add_setting_options(parser, "CUDA: 64, CPU: 8")
    add, recipes = parser.add_argument, tuple(RECIPES)
    add("--recipe", nargs="+", default=["mpl"], choices=recipes, metavar="NAME", help="(mpl)")
    add("--compile", default="default", choices=("default", "max-autotune"), help="(%(default)s)")
    add("--only", nargs="+", default=[], metavar="TEXT", help="variants with this in the name")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Recipe after recipe."""
    setting = setting_of(options, cuda=64, cpu=8)
    chosen = [_chosen(options, setting, recipe) for recipe in options.recipe]
    # No compiled network may fall back to an eager one unnoticed.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    report.claim = (
        f"{setting.model}, {setting.labeled} labeled images of {setting.size} pixels and "
        f"{setting.mu} unlabeled for each, on the device already; interleaved rounds"
    )
    report.more |= {"correctness": [], BEST: {}}
    _note(report, [step_checks.parity(setting)])
    gpu = torch.cuda.get_device_name() if setting.device.type == "cuda" else ""
    for number, (recipe, variants) in enumerate(zip(options.recipe, chosen, strict=True)):
        left = report.seconds_left(len(chosen) - number)
        found = _recipe(options, setting, recipe, variants, left, report)
        scene = Scene(setting, recipe, passes(setting, recipe), gpu, options.smoke)
        report.more[BEST][recipe] = best(found)
        report.add(rows(found, scene))


def passes(setting: Setting, recipe: str) -> float:
    """What a step costs, in forward passes of one image.

    A backward pass counts 2, and a forward pass with a derivative 3: convolved are images by
    weights, and the change of each by the other.
    """
    counted = step_rows.count(RECIPES[recipe], *setting.counts(recipe), steps=STEPS, step=0)
    return counted.forward + 2.0 * counted.backward + 3.0 * counted.tangent


def _chosen(options: argparse.Namespace, setting: Setting, recipe: str) -> dict[str, Builder]:
    only = options.only or (FEW if options.smoke else [""])
    every = builders(setting, recipe, options.compile)
    chosen = {n: build for n, build in every.items() if any(text in n for text in only)}
    if not chosen:
        raise ConfigError(f"--only {' '.join(only)}: there are {', '.join(every)}")
    return chosen


def _note(report: Report, checks: Sequence[step_checks.Check]) -> None:
    report.more["correctness"] += [one._asdict() for one in checks]
    for one in checks:
        if one.wrong:
            report.fail(one.what, f"off by {one.error:.2g}, allowed are {one.tolerance:g}")


def _recipe(
    options: argparse.Namespace,
    setting: Setting,
    recipe: str,
    variants: Mapping[str, Builder],
    seconds: float,
    report: Report,
) -> Found:
    """The variants are built while there is time, then take turns."""
    began = time.monotonic()
    ready = _built(recipe, variants, began + BUILT * seconds, report)
    fallen = set[str]()
    measured = interleaved(
        ready,
        lambda one: _turn(one, fallen),
        rounds=options.rounds,
        warmup=1,
        seed=options.seed,
        seconds=0.8 * (seconds - (time.monotonic() - began)),
    )
    for name in sorted(fallen):
        report.skipped.append(f"{recipe}: failed: {name}: out of memory beside the others")
        del ready[name], measured[name]
    in_time = time.monotonic() - began < seconds
    if not in_time:
        report.skipped.append(f"{recipe}: no time: phases")
    _note(report, _checks(ready.values(), setting, recipe))
    turns = min(PHASE_ROUNDS, options.rounds)
    parts = {name: _phases(one.variant, turns) for name, one in ready.items() if in_time}
    memory = {name: one.memory for name, one in ready.items() if one.memory}
    return Found(measured, {name: found for name, found in parts.items() if found}, memory)


def _built(
    recipe: str, variants: Mapping[str, Builder], end: float, report: Report
) -> dict[str, Ready]:
    """Variants that run; one that fails, for lack of memory or of a compiler, is left out.

    None is begun if one like the slowest so far would not be ready by `end`.
    """
    ready, slowest = dict[str, Ready](), 0.0
    for name, build in variants.items():
        began = time.monotonic()
        if ready and began + slowest > end:
            report.skipped.append(f"{recipe}: no time: {name}")
            continue
        print(f"building {name}", flush=True)
        try:
            one = _warmed(build)
            if one is not None:
                ready[name] = one
        except Exception as error:
            report.skipped.append(f"{recipe}: failed: {name}: {one_line(error)}")
        _free()
        slowest = max(slowest, time.monotonic() - began)
    return ready


def _warmed(build: Builder) -> Ready | None:
    """Runs it, so that compilers, libraries and the allocator's cache are warm."""
    gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if gpu else 0
    variant = build()
    if variant is None:
        return None
    metrics: Mapping[str, Any] = {}
    for _ in range(WARM_ON_GPU if gpu else WARM):  # alike for all: their metrics are compared
        metrics = variant.step()
    numbers = {name: float(value) for name, value in metrics.items()}
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    once = seconds_of(variant.step)
    # What lies in a graph's own pool is not among what is allocated.
    graphed = variant.flavor is not None and variant.flavor.graphs != "off"
    memory = torch.cuda.max_memory_allocated() - before if gpu and not graphed else 0
    # Steps back to back: a wait for the GPU after each would be part of the number.
    repeats = min(AT_MOST, max(1, round(AT_LEAST / once)))
    return Ready(variant, repeats, memory, numbers)


def _turn(ready: Ready, fallen: set[str]) -> float:
    """Seconds of a step; a variant that runs out of memory does nothing any more."""
    name, step, *_ = ready.variant
    if name not in fallen:
        try:
            return seconds_of(repeated(step, ready.repeats)) / ready.repeats
        except torch.OutOfMemoryError:
            fallen.add(name)
        _free()  # here, where the error no longer holds tensors
    return math.nan


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _phases(variant: Variant, turns: int) -> dict[str, list[float]]:
    """After the timing, since it waits for the device again and again."""
    if not variant.owners or (variant.flavor and variant.flavor.graphs == "step"):
        return {}  # a graph of a whole step calls no method
    found = [phases(variant.step, variant.owners) for _ in range(turns + 1)][1:]
    return {name: [turn.get(name, 0.0) for turn in found] for name in found[0]}


def _checks(ready: Any, setting: Setting, recipe: str) -> list[step_checks.Check]:
    images = batch(setting, recipe).labeled
    flavored = [(one.variant.flavor, one) for one in ready if one.variant.flavor is not None]
    checks = step_checks.same_losses({f: one.metrics for f, one in flavored}, setting.device)
    for flavor, one in flavored:
        dtype = torch.bfloat16 if flavor.bf16 else torch.float32
        checks += step_checks.compiled_logits(one.variant, images.to(dtype))
    return checks


def best(found: Found, only: str = "ours") -> str | None:
    """The variant with the shortest step of those whose name begins so."""
    mine = [name for name in found.seconds if name.startswith(only)]
    return min(mine, key=lambda name: median(found.seconds[name]), default=None)


def rows(found: Found, scene: Scene) -> list[Row]:
    """Everything about a recipe, with the project's aims."""
    made = [*_steps(found, scene), *_against_plain(found), *_split(found)]
    made += [*_per_pass(found, scene), *_phases_and_memory(found)]
    aims = targets(scene, best(found) or "no step of ours")
    return [
        row._replace(
            name=f"{scene.recipe}, {row.name}",
            steady=row.steady and not scene.smoke,
            target=next((aim for end, aim in aims.items() if row.name.endswith(end)), None),
        )
        for row in made
    ]


def targets(scene: Scene, first: str) -> dict[str, float]:
    """Aims by the end of a row's name; `first` is the fastest of ours."""
    setting = scene.setting
    if scene.on_cpu:
        return {f"{PLAIN} / {BEST}": 2.5, f"{PLAIN} / {BEST} in fp32": 1.3}
    if not scene.hopper:
        return {}
    found = {" / split": 1.25, " passes": 1.05}
    if setting.model == "wrn_28_2":
        found[f"{PLAIN_AMP} / {BEST}"] = 4.0
    if setting.model == "resnet50":
        found[f"{PLAIN_AMP} / {BEST}"] = 2.5
    if setting[:4] == ("wrn_28_2", 64, 7, 32):
        found[f"{first}: step"] = 15.0
    if (setting.model, setting.mu) == ("resnet50", 7):
        found[f"{first}: distinct images"] = 1000.0
    return found


def _steps(found: Found, scene: Scene) -> Iterator[Row]:
    for name, times in found.seconds.items():
        yield Row(f"{name}: step", spread([1e3 * s for s in times]), "ms")
        rates = spread([scene.setting.distinct / s for s in times])
        what = "images" if name.startswith("one pass") else "distinct images"
        yield Row(f"{name}: {what}", rates, "img/s", "higher")


def _against_plain(found: Found) -> Iterator[Row]:
    """How many times faster each of ours is than the plain step."""
    for plain in (PLAIN, PLAIN_AMP):
        if plain not in found.seconds:
            continue
        for name in found.seconds:
            if name.startswith("ours"):
                yield _speedup(found, plain, name, f"{plain} / {name}")
        if one := best(found):
            yield _speedup(found, plain, one, f"{plain} / {BEST}")
        if (one := best(found, "ours fp32 compiled")) and plain == PLAIN:
            yield _speedup(found, plain, one, f"{plain} / {BEST} in fp32")


def _split(found: Found) -> Iterator[Row]:
    """How many times faster it is to normalize the weak views by themselves."""
    for name in found.seconds:
        joint = name.replace("split", "joint")
        if joint != name and joint in found.seconds:
            yield _speedup(found, joint, name, f"{joint} / split")


def _per_pass(found: Found, scene: Scene) -> Iterator[Row]:
    """A step's time over that of its passes, of which a supervised image makes three."""
    for name, times in found.seconds.items():
        how = name.removeprefix("ours ").rpartition(" ")[0]
        alone = found.seconds.get(f"one pass {how}")
        if alone is None or not name.endswith("joint"):
            continue
        image = 3.0 * scene.setting.distinct
        shares = [t / (scene.passes * s / image) for t, s in zip(times, alone, strict=True)]
        what = f"{name}: step / its {scene.passes:.0f} passes"
        yield Row(what, spread(shares), "x", steady=True)


def _phases_and_memory(found: Found) -> Iterator[Row]:
    for name, parts in found.phases.items():
        for phase, times in parts.items():
            yield Row(f"{name}, phase: {phase}", spread([1e3 * s for s in times]), "ms")
    for name, peak in found.memory.items():
        yield Row(f"{name}: peak memory", spread([peak / 1e9]), "GB")


def _speedup(found: Found, slow: str, fast: str, name: str) -> Row:
    return Row(name, ratios(found.seconds, slow, fast), "x", "higher", steady=True)
