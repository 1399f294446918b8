"""Trains variants of a config with the same seeds and compares them in pairs: python
tools/ablation.py --rec REC --out DIR --config FILE --seeds 0 1 2 [--variant NAME KEY=VALUE ...]"""

import argparse
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpl_fast.config.command_line import fail
from mpl_fast.data.manifest import read_manifest
from mpl_fast.errors import ConfigError, UserError, output_errors
from tools.ablate.picture import draw
from tools.ablate.plan import DEFAULTS, Job, Variant, jobs
from tools.ablate.report import summarize, write
from tools.ablate.running import Result, run

ABOUT = """Trains variants of one config with the same seeds, one run after the other, each as a
process of mpl_fast/train.py, and compares them: ablation.json, ablation.md and ablation.png in the
--out folder. The same command goes on where it was stopped. Exit code 1: a run failed, which its
row says, or Ctrl-C."""


def main() -> int:
    """The table is written after every run, so that a long ablation can be looked at early."""
    options = _options()
    began = time.perf_counter()
    try:
        variants = _variants(options.variant)
        read_manifest(options.rec)  # else every run would find the same fault
        with output_errors(options.out):
            options.out.mkdir(parents=True, exist_ok=True)
            planned = jobs(
                variants, options.seeds, options.config, options.rec, options.out, options.steps
            )
            results = _train(planned, variants, options)
            _report(results, variants, options)
    except UserError as error:
        fail("ablation", error)
    except KeyboardInterrupt:
        sys.exit("ablation: interrupted; the same command goes on from what is saved")
    print(f"ablation finished in {time.perf_counter() - began:.0f} s")
    return int(any(result.summary is None for result in results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=ABOUT)
    add = parser.add_argument
    add("--rec", type=Path, required=True, help="folder that tools/make_rec.py pack wrote")
    add("--out", type=Path, required=True, help="folder for runs and results")
    add("--config", type=Path, required=True, help="YAML file of train.py that variants vary")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of every variant")
    add(
        "--variant",
        nargs="+",
        action="append",
        metavar=("NAME", "KEY=VALUE"),
        help="a variant and options of train.py for it, such as algorithm.feedback=exact; "
        "recipe=NAME carries over the settings that this recipe knows; all are compared with the "
        "first variant, and with another one by against=NAME (default: "
        + ", ".join(v.name for v in DEFAULTS)
        + ")",
    )
    add("--steps", type=int, default=0, help="training steps (0: as configured)")
    add("--ranks", type=int, default=1, help="processes of each run")
    options = parser.parse_args()
    if options.steps < 0 or options.ranks < 1 or min(options.seeds) < 0:
        parser.error("--steps and --seeds must be at least 0, --ranks at least 1")
    if len(set(options.seeds)) < len(options.seeds):
        parser.error("--seeds names one twice")
    return options


def _variants(asked: list[list[str]] | None) -> tuple[Variant, ...]:
    if not asked:
        return DEFAULTS
    found = tuple(_variant(name, settings) for name, *settings in asked)
    names = [variant.name for variant in found]
    for variant in found:
        if not re.fullmatch(r"\w[\w.+-]*", variant.name) or variant.name in ("configs", "logs"):
            raise ConfigError(f"variant {variant.name!r} cannot be the name of a folder")
        if names.count(variant.name) > 1:
            raise ConfigError(f"variant {variant.name} is named twice")
        if variant.against and variant.against not in names:
            raise ConfigError(f"variant {variant.name}: there is no variant {variant.against!r}")
        for setting in variant.settings:
            if not re.fullmatch(r"[\w.-]+=.*", setting):
                raise ConfigError(f"variant {variant.name}: {setting!r} is not KEY=VALUE")
    return found


def _variant(name: str, settings: list[str]) -> Variant:
    against = [s.partition("=")[2] for s in settings if s.startswith("against=")]
    kept = tuple(s for s in settings if not s.startswith("against="))
    return Variant(name, kept, against[-1] if against else "")


def _train(
    planned: list[Job], variants: tuple[Variant, ...], options: argparse.Namespace
) -> list[Result]:
    results: list[Result] = []
    told: set[tuple[str, str]] = set()
    for number, job in enumerate(planned, 1):
        name = f"[{number}/{len(planned)}] {job.name}"
        print(f"{name}: {'complete already' if job.complete else 'training'}", flush=True)
        log = options.out / "logs" / f"{job.variant.name}_seed{job.seed}.log"
        result = run(job, options.ranks, log, told)
        results.append(result)
        print(f"{name}: {_outcome(result)}", flush=True)
        _write(results, variants, options)
    return results


def _outcome(result: Result) -> str:
    if not result.summary:
        return f"failed: {result.reason}"
    return f"top-1 {result.summary['top1']:.2f} % in {result.summary['seconds']:.0f} s of training"


def _write(
    results: list[Result], variants: tuple[Variant, ...], options: argparse.Namespace
) -> str:
    return write(options.out, summarize(variants, results), options.config.name, len(options.seeds))


def _report(
    results: list[Result], variants: tuple[Variant, ...], options: argparse.Namespace
) -> None:
    print(f"\n{_write(results, variants, options)}\n")
    try:
        drawn = draw(results, options.out / "ablation.png")
    except ModuleNotFoundError as error:
        print(f"no picture: {error.name} is missing: pip install {error.name}", file=sys.stderr)
        drawn = False
    for name in ("ablation.json", "ablation.md", *(["ablation.png"] if drawn else [])):
        print(options.out / name)


if __name__ == "__main__":
    sys.exit(main())
