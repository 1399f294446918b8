"""`make demo`: packs handwritten digits, trains three recipes on them and shows the result."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpl_fast.config import RunConfig
from mpl_fast.config.command_line import phases
from mpl_fast.errors import DataError, run_command
from mpl_fast.training.curves import SUMMARY, read_summary
from mpl_fast.training.process import die_with_launcher, visible_gpus

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"supervised": "labeled only", "uda": "UDA", "mpl": "MPL"}
LABELED = 50  # 5 a class
HELD_OUT = 500

Result = dict[str, Any]


def main() -> int | None:
    """Every part is the command that a user would type, and is printed before it runs."""
    options = _options()
    if options.rank:
        return _train_all(options)
    began = time.perf_counter()
    images = write_digits(options.out / "images")
    for seed in range(options.seeds):
        _pack(images, _rec(options, seed), seed)
    _start_ranks(options)
    seeds = range(options.seeds)
    runs = {name: [_result(_run_dir(options, name, seed)) for seed in seeds] for name in RECIPES}
    summary = {name: _over_seeds(results) for name, results in runs.items()}
    file = options.out / "summary.json"
    file.write_text(json.dumps(summary, indent=1) + "\n")
    picture = _draw(runs, options)
    page = _report(runs, options)
    print(f"\n{table(summary, options)}\n\n{file}\n{picture}\n{page}")
    print(f"demo finished in {time.perf_counter() - began:.0f} s")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="Trains three recipes on scikit-learn's handwritten digits, 5 labels a class.",
    )
    parser.add_argument("--seeds", type=int, default=1, help="label draws to average over")
    parser.add_argument("--steps", type=int, default=0, help="training steps (0: as configured)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything")
    parser.add_argument("--ranks", type=int, default=0, help="processes (0: one a GPU, else 2)")
    parser.add_argument("--rank", action="store_true", help="under torchrun: train, as one rank")
    options = parser.parse_args()
    if options.seeds < 1 or options.steps < 0 or options.ranks < 0:
        parser.error("--seeds must be at least 1, --steps and --ranks at least 0")
    return options


def write_digits(folder: Path) -> Path:
    """1,797 real scans of 8 x 8 pixels, enlarged to 32 x 32, as JPEG files in class folders."""
    if (folder / "complete").exists():
        return folder
    import cv2
    import numpy as np
    import simplejpeg
    from sklearn.datasets import load_digits

    shutil.rmtree(folder, ignore_errors=True)
    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))
    for place, i in enumerate(order):
        small = (digits.images[i] * 255 / 16).astype(np.uint8)
        gray = cv2.resize(small, (32, 32), interpolation=cv2.INTER_CUBIC)
        color = np.ascontiguousarray(np.repeat(gray[..., None], 3, axis=2))
        split = "val" if place < HELD_OUT else "train"
        file = folder / split / str(digits.target[i]) / f"{i:04d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(simplejpeg.encode_jpeg(color, quality=95))
    (folder / "complete").touch()
    return folder


def _rec(options: argparse.Namespace, seed: int) -> Path:
    folder: Path = options.out / f"rec_seed{seed}"
    return folder


def _run_dir(options: argparse.Namespace, recipe: str, seed: int) -> Path:
    steps = f"_{options.steps}steps" if options.steps else ""
    folder: Path = options.out / f"{recipe}_seed{seed}{steps}"
    return folder


def _pack(images: Path, out: Path, seed: int) -> None:
    command: list[Any] = [sys.executable, ROOT / "tools" / "make_rec.py", "pack"]
    command += ["--src", images / "train", "--val", images / "val", "--out", out]
    _run([*command, "--labeled", str(LABELED), "--split-seed", str(seed)])


def _start_ranks(options: argparse.Namespace) -> None:
    """All runs are trained by the same processes, which start only once: that takes seconds."""
    ranks = options.ranks or _ranks()
    command: list[Any] = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", Path(__file__), "--rank", "--out", options.out]
    command += ["--seeds", str(options.seeds), "--steps", str(options.steps)]
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    _run(command, {"OMP_NUM_THREADS": threads} if "OMP_NUM_THREADS" not in os.environ else {})


def _train_all(options: argparse.Namespace) -> int:
    """Trains every recipe on every label draw, on each rank; returns the exit code."""
    die_with_launcher()
    from mpl_fast import distributed
    from mpl_fast.training.phases import train

    configs: list[RunConfig] = []
    for seed in range(options.seeds):
        for recipe in RECIPES:
            arguments: list[Any] = ["--config", ROOT / "configs" / f"demo_{recipe}.yaml"]
            arguments += ["--data.root", _rec(options, seed)]
            arguments += ["--run-dir", _run_dir(options, recipe, seed), "--seed", str(seed)]
            if options.steps:
                arguments += ["--steps", str(options.steps)]
            if distributed.ranks_of_launcher()[0] == 0:
                _show(["  train.py", *arguments])
            configs += phases([str(part) for part in arguments])
    code = train(*configs)
    distributed.shutdown()
    return code


def _result(run: Path) -> Result:
    summary = read_summary(run)
    if not summary:
        raise DataError(f"{run / SUMMARY} is missing or damaged: run the same command again")
    return {**summary, "run_dir": str(run)}


def _ranks() -> int:
    """One process a GPU; without one, two that share the cores, so that the demo is distributed."""
    return len(visible_gpus()) or min(2, os.cpu_count() or 1)


def _run(command: list[Any], extra: dict[str, str] | None = None) -> None:
    _show(["$", *command])
    process = subprocess.Popen([str(part) for part in command], env=os.environ | (extra or {}))
    interrupted = False
    while process.poll() is None:
        try:
            process.wait()
        except KeyboardInterrupt:  # which the command has received as well, and saves
            interrupted = True
    if interrupted:
        sys.exit("demo: interrupted; the same command goes on from what is saved")
    if process.returncode:
        sys.exit(process.returncode)  # it has printed the reason


def _show(command: list[Any]) -> None:
    print(" ".join(_shown(part) for part in command), flush=True)


def _shown(part: Any) -> str:
    """A path as the user would type it from here."""
    if str(part) == sys.executable:
        return "python"
    return os.path.relpath(part) if isinstance(part, Path) else str(part)


def _over_seeds(results: list[Result]) -> Result:
    """Means over label draws; `top1_sd` is the standard deviation between them."""
    means = {k: statistics.fmean(r[k] for r in results) for k in ("top1", "train_seconds")}
    means["images_per_second"] = statistics.fmean(r["images_per_second"] for r in results)
    draws = [r["top1"] for r in results]
    spread = statistics.stdev(draws) if len(draws) > 1 else None
    return {**means, "top1_sd": spread, "top1_draws": draws, "steps": results[0]["steps"]}


def table(summary: dict[str, Result], options: argparse.Namespace) -> str:
    """Markdown, and how MPL compares, unless the runs were shortened."""
    lines = [
        f"{LABELED // 10} labels a class, {HELD_OUT} held-out digits, "
        f"{options.seeds} label draw(s)",
        "",
        "| recipe | top-1 (%) | seconds of training | images/s |",
        "| --- | --- | --- | --- |",
    ]
    for name, title in RECIPES.items():
        r = summary[name]
        spread = "" if r["top1_sd"] is None else f" ± {r['top1_sd']:.1f}"
        speed = f"{r['train_seconds']:.0f} | {r['images_per_second']:.0f}"
        lines.append(f"| {title} | {r['top1']:.1f}{spread} | {speed} |")
    labeled, uda = (summary["mpl"]["top1"] - summary[k]["top1"] for k in ("supervised", "uda"))
    verdict = f"MPL is {labeled:+.1f} points against labeled only, {uda:+.1f} against UDA."
    if options.steps:
        verdict = f"--steps {options.steps}: a shortened run says nothing about accuracy."
    return "\n".join([*lines, "", verdict])


def _draw(runs: dict[str, list[Result]], options: argparse.Namespace) -> Path:
    from mpl_fast.training.curves import draw

    out: Path = options.out / "curves.png"
    curves = [(RECIPES[name], Path(r["run_dir"])) for name in RECIPES for r in runs[name]]
    draw(curves, out, title=f"Handwritten digits, {LABELED // 10} labels a class")
    return out


def _report(runs: dict[str, list[Result]], options: argparse.Namespace) -> Path:
    """MPL first, which is then shown in detail."""
    out: Path = options.out / "report.html"
    folders = [Path(result["run_dir"]) for name in reversed(RECIPES) for result in runs[name]]
    _run([sys.executable, ROOT / "tools" / "report.py", *folders, "--out", out])
    return out


if __name__ == "__main__":
    run_command("demo", main)
