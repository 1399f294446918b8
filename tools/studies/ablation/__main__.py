"""Trains variants of a config with the same seeds and compares them in pairs: python -m
tools.studies.ablation --rec REC --out DIR --config FILE --seeds 0 1 2 [--variant NAME KEY=VALUE]"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mpl_fast.data.manifest import read_manifest
from mpl_fast.errors import ConfigError, UserError, fail, output_errors
from tools.studies.ablation import report
from tools.studies.ablation.picture import draw
from tools.studies.ablation.plan import DEFAULTS, Job, Variant, jobs
from tools.studies.ablation.run import Result, run

ABOUT = """Trains variants of one config with the same seeds, one run after the other, each as a
process of mpl_fast/train.py, and compares them: ablation.json, ablation.md and ablation.png in the
--out folder. The same command continues where it was stopped. Exit code 1: a run failed, with the
reason in its row, or Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The table is written after every run, so that a long ablation can be looked at early."""
    options = _options(arguments)
    began = time.perf_counter()
    try:
        variants = _variants(options.variant)
        read_manifest(options.rec)  # else every run would report the same error
        with output_errors(options.out):
            options.out.mkdir(parents=True, exist_ok=True)
            planned = jobs(
                variants, options.seeds, options.config, options.rec, options.out, options.steps
            )
            results = _train(planned, variants, options)
    except UserError as error:
        fail("ablation", error)
    except KeyboardInterrupt:
        sys.exit("ablation: interrupted; the same command continues from what is saved")
    print(f"ablation finished in {time.perf_counter() - began:.0f} s")
    return int(any(result.summary is None for result in results))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ablation", description=ABOUT)
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
        "recipe=NAME carries over the settings that this recipe has; all are compared with the "
        "first variant, and with another one by against=NAME (default: "
        + ", ".join(v.name for v in DEFAULTS)
        + ")",
    )
    add("--steps", type=int, default=0, help="training steps (0: as configured)")
    add("--ranks", type=int, default=1, help="processes of each run")
    options = parser.parse_args(arguments)
    if options.steps < 0 or options.ranks < 1 or min(options.seeds) < 0:
        parser.error("--steps and --seeds must be at least 0, --ranks at least 1")
    if len(set(options.seeds)) < len(options.seeds):
        parser.error("--seeds names one twice")
    return options


def _variants(given: list[list[str]] | None) -> tuple[Variant, ...]:
    if not given:
        return DEFAULTS
    variants = tuple(_variant(name, settings) for name, *settings in given)
    names = [variant.name for variant in variants]
    for variant in variants:
        if not re.fullmatch(r"\w[\w.+-]*", variant.name) or variant.name in ("configs", "logs"):
            raise ConfigError(f"variant {variant.name!r} cannot be the name of a folder")
        if names.count(variant.name) > 1:
            raise ConfigError(f"variant {variant.name} is named twice")
        if variant.against and variant.against not in names:
            raise ConfigError(f"variant {variant.name}: there is no variant {variant.against!r}")
        for setting in variant.settings:
            if not re.fullmatch(r"[\w.-]+=.*", setting):
                raise ConfigError(f"variant {variant.name}: {setting!r} is not KEY=VALUE")
    return variants


def _variant(name: str, settings: list[str]) -> Variant:
    against = [s.partition("=")[2] for s in settings if s.startswith("against=")]
    kept = tuple(s for s in settings if not s.startswith("against="))
    return Variant(name, kept, against[-1] if against else "")


def _train(
    planned: list[Job], variants: tuple[Variant, ...], options: argparse.Namespace
) -> list[Result]:
    results: list[Result] = []
    table, shown = "", set[tuple[str, str]]()
    for number, job in enumerate(planned, 1):
        name = f"[{number}/{len(planned)}] {job.name}"
        print(f"{name}: {'complete already' if job.complete else 'training'}", flush=True)
        log = options.out / "logs" / f"{job.variant.name}_seed{job.seed}.log"
        results.append(run(job, options.ranks, log, shown))
        print(f"{name}: {_outcome(results[-1])}", flush=True)
        rows = report.summarize(variants, results)
        table = report.write(options.out, rows, options.config.name, len(options.seeds))
    print(f"\n{table}\n")
    files = ["ablation.json", "ablation.md"]
    try:
        files += ["ablation.png"] if draw(results, options.out / "ablation.png") else []
    except ModuleNotFoundError as error:
        print(f"no picture: {error.name} is missing: pip install {error.name}", file=sys.stderr)
    print(*(options.out / name for name in files), sep="\n")
    return results


def _outcome(result: Result) -> str:
    if not result.summary:
        return f"failed: {result.reason}"
    top1, seconds = result.summary["top1"], result.summary["train_seconds"]
    return f"top-1 {top1:.2f} % in {seconds:.0f} s of training"


if __name__ == "__main__":
    sys.exit(main())
