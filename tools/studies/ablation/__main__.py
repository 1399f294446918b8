"""Trains variants of a config with the same seeds and compares them in pairs: python -m
tools.studies.ablation --rec REC --out DIR --config FILE --seeds 0 1 2 [--variant NAME KEY=VALUE]"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mpl_fast.data.manifest import Manifest, read_manifest
from mpl_fast.errors import ConfigError, output_errors, run_command
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
    variants = _variants(options.variant) if options.variant else DEFAULTS
    manifest = read_manifest(options.rec)  # else every run would report the same error
    with output_errors(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        planned = jobs(
            variants, options.seeds, options.config, options.rec, options.out, options.steps
        )
        _refuse_others(planned, manifest)
        try:
            results = _train(planned, variants, options)
        except KeyboardInterrupt:
            sys.exit("ablation: interrupted; the same command continues from what is saved")
    print(f"ablation finished in {time.perf_counter() - began:.0f} s")
    return int(any(result.summary is None for result in results))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ablation", description=ABOUT, allow_abbrev=False)
    add = parser.add_argument
    add("--rec", type=Path, required=True, help="folder that tools/make_rec.py pack wrote")
    add("--out", type=Path, required=True, help="folder for runs and results")
    add("--config", type=Path, required=True, help="YAML file of train.py that variants vary")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of every variant (0 1 2)")
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
    add("--ranks", type=int, default=1, help="processes of each run (%(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < 0 or options.ranks < 1 or min(options.seeds) < 0:
        parser.error("--steps and --seeds must be at least 0, --ranks at least 1")
    if len(set(options.seeds)) < len(options.seeds):
        parser.error("--seeds names one twice")
    return options


def _variants(given: list[list[str]]) -> tuple[Variant, ...]:
    names = [name for name, *_ in given]
    variants = []
    for name, *settings in given:
        against = [s.partition("=")[2] for s in settings if s.startswith("against=")]
        if not re.fullmatch(r"\w[\w.+-]*", name) or name in ("configs", "logs"):
            raise ConfigError(f"variant {name!r} cannot be the name of a folder")
        if names.count(name) > 1:
            raise ConfigError(f"variant {name} is named twice")
        if unknown := [other for other in against if other not in names]:
            raise ConfigError(f"variant {name}: there is no variant {unknown[0]!r}")
        for setting in settings:
            if not re.fullmatch(r"[\w.-]+=.*", setting):
                raise ConfigError(f"variant {name}: {setting!r} is not KEY=VALUE")
        own = tuple(s for s in settings if not s.startswith("against="))
        variants.append(Variant(name, own, *against[-1:]))
    return tuple(variants)


def _refuse_others(planned: list[Job], manifest: Manifest) -> None:
    """Raises `ConfigError`, before any result is overwritten, if a folder holds another run."""
    # Imported here: PyTorch takes seconds, which --help does not need.
    from mpl_fast.training.build import resolve_epochs
    from mpl_fast.training.same_config import check_same_config

    for job in planned:
        try:
            check_same_config(job.folder / "config.yaml", resolve_epochs(job.config, manifest))
        except ConfigError as error:
            advice = "or another --out for this ablation"
            raise ConfigError(f"variant {job.variant.name}: {error}, {advice}") from None


def _train(
    planned: list[Job], variants: tuple[Variant, ...], options: argparse.Namespace
) -> list[Result]:
    results: list[Result] = []
    shown: set[tuple[str, str]] = set()
    for number, job in enumerate(planned, 1):
        name = f"[{number}/{len(planned)}] {job.name}"
        print(f"{name}: {'complete already' if job.complete else 'training'}", flush=True)
        log = options.out / "logs" / f"{job.variant.name}_seed{job.seed}.log"
        results.append(run(job, options.ranks, log, shown))
        print(f"{name}: {results[-1].outcome}", flush=True)
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


if __name__ == "__main__":
    run_command("ablation", main)
