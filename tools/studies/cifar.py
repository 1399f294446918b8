"""CIFAR-10 with 4,000 labels, algorithms with equal numbers of FLOPs: python -m tools.studies.cifar
--src cifar10-jpeg.tar.xz --out DIR [--only NAME ...] [--compute SHARE ...] [--draws N ...]"""

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from mpl_fast.atomic import atomic_path, write_json, write_text
from mpl_fast.errors import DataError, output_errors, run_command
from mpl_fast.training.curves import read_summary
from mpl_fast.untrusted import json_object
from tools.studies import command
from tools.studies.ablation.picture import curve
from tools.studies.ablation.plan import Job, Variant
from tools.studies.ablation.run import Result, run

ROOT = Path(__file__).resolve().parents[2]
ABOUT = """Trains the recipes configs/cifar10_4k_fast_*.yaml, and variants of them, with equal
numbers of FLOPs on several draws of the labels: cifar.json, cifar.md and cifar.png in the --out
folder. A run is as long as its FLOPs allow, and its schedules with it. The same command continues
where it was stopped; a cifar.json from elsewhere in the folder is continued too. Exit code 1: a run
failed, or Ctrl-C."""
ABOUT_TABLE = """Top-1 (%) of the test images at the end of training, by the averaged weights, after
a share of 2.5e15 FLOPs: mean ± standard deviation over draws of the labels (their number). In
brackets: the difference to another row, mean ± standard error over pairs of one draw. An empty cell
has not been run: `python -m tools.studies.cifar --src SRC --out DIR --only ROW --compute SHARE`
(mpl_finetuned: `--only mpl mpl_finetuned`; other numbers of labels: `--labels N`)."""
FULL = 2.5e15
"""FLOPs of a full run: about an hour on two cores of a Xeon with AMX."""
SHARES = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(1))
SCHEDULED = ("warmup", "ramp", "feedback_ramp", "delay_steps", "eval_every", "checkpoint_every")
"""Options in steps, which are scaled with the length of a run."""
KEYS = ("top1", "steps", "train_seconds", "images_per_second")  # of a run's summary.json
Json = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A row of the table: a config of configs/ and options in which it differs."""

    name: str
    config: str
    settings: tuple[str, ...] = ()
    against: str = "uda"
    """The row that it is compared with, in pairs of one draw."""
    after: str = ""
    """The row whose run it continues, and whose FLOPs it adds its own to."""


_OFF, _SOFT = "algorithm.feedback=off", "algorithm.labels=soft"
_NETWORK = ("algorithm.targets=network", "algorithm.bn_batches=split")
_HARD = ("algorithm.labels=argmax", "algorithm.temperature=1")
ROWS = (
    Row("supervised", "fast_supervised"),
    Row("uda", "fast_uda"),
    Row("fixmatch", "fast_fixmatch"),
    Row("best", "fast_best", against="fixmatch"),
    Row("mpl", "fast_mpl"),
    Row("mpl_exact", "fast_mpl_exact"),
    Row("smpl", "fast_smpl"),
    Row("metasemi", "fast_metasemi"),
    Row("mpl_finetuned", "fast_finetune", against="mpl", after="mpl"),
    Row("mpl_off", "fast_mpl", (_OFF,), against="mpl"),
    Row("mpl_off_soft", "fast_mpl", (_OFF, _SOFT), against="mpl_exact"),
    Row("mpl_exact_held_out", "fast_mpl_exact", ("algorithm.held_out=0.5",), against="mpl_exact"),
    # What each part of the best recipe is worth.
    Row("best_by_network", "fast_best", _NETWORK, against="best"),
    Row("best_unaligned", "fast_best", ("algorithm.alignment=false",), against="best"),
    Row("best_argmax", "fast_best", _HARD, against="best"),
    Row("best_adaptive", "fast_best", (*_HARD, "algorithm.thresholds=adaptive"), "best_argmax"),
)
BY_NAME = {row.name: row for row in ROWS}


class Cell(NamedTuple):
    """One run: a row, with a share of the FLOPs of a full run, on one draw of the labels."""

    row: Row
    share: Fraction
    labels: int
    draw: int

    @property
    def text(self) -> str:
        """For messages."""
        return (
            f"{self.row.name}, {self.share} of {FULL:.1e} FLOPs, "
            f"draw {self.draw} of {self.labels} labels"
        )

    @property
    def records(self) -> str:
        """The folder of the records, below --out."""
        return f"records/{self.labels}_{self.draw}"

    @property
    def folder(self) -> str:
        """Of the run, below --out."""
        return f"{self.row.name}/{float(self.share):g}/{self.labels}_{self.draw}"


def key_of(cell: Cell) -> Json:
    """What a result depends on, as it is in cifar.json."""
    row, share, labels, draw = cell
    config = hashlib.sha256(config_file(row).read_bytes().partition(b"\nrecipe:")[2]).hexdigest()
    return {
        "row": row.name,
        "share": str(share),
        "labels": labels,
        "draw": draw,
        "settings": list(row.settings),
        "config_sha256": config,  # below its header
    }


def config_file(row: Row) -> Path:
    """The YAML file of a row."""
    return ROOT / "configs" / f"cifar10_4k_{row.config}.yaml"


class Study:
    """Packs, plans, trains and tabulates; results are kept in OUT/cifar.json."""

    def __init__(self, src: Path, out: Path) -> None:
        self.src, self.out = src, out.resolve()
        self.results = _read(out / "cifar.json")
        self._flops: dict[str, int] = {}  # of a step, by row

    def pack(self, cell: Cell) -> Path:
        """The records of a draw of the labels, packed if they are not there yet."""
        rec = self.out / cell.records
        if not (rec / "manifest.json").exists():
            train, val = (
                f"{self.src}/{part}" if self.src.is_dir() else f"{self.src}:{part}"
                for part in ("train", "test")
            )
            options = ["--labeled", f"{cell.labels}", "--split-seed", f"{cell.draw}", "--quiet"]
            make_rec = [sys.executable, str(ROOT / "tools/make_rec.py"), "pack"]
            line = [*make_rec, "--src", train, "--val", val, *options, "--out", str(rec)]
            done = subprocess.run(line, stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                raise DataError(f"packing {rec}: {said[-1]}")
        return rec

    def job(self, cell: Cell) -> Job:
        """The run of a cell: as many steps as its FLOPs allow, and schedules of that length."""
        row, folder = cell.row, self.out / cell.folder
        given = ["--config", str(config_file(row)), "--data.root", str(self.pack(cell))]
        given += ["--run-dir", str(folder), "--seed", str(cell.draw)]
        given += [f"--{setting}" for setting in row.settings]
        if row.after:
            start = self.out / cell._replace(row=BY_NAME[row.after]).folder
            given += ["--algorithm.start", str(start)]
        # Late: PyTorch takes seconds, which --help does not need.
        from mpl_fast.config.command_line import parse
        from mpl_fast.config.fields import all_options

        config = parse(given)
        if not row.after:  # else as long as configured
            steps = max(1, round(float(cell.share) * FULL / self.flops_of_step(row)))
            for option in all_options(config):
                if option.key.rpartition(".")[2] in SCHEDULED and option.value:
                    scaled = max(1, round(option.value * steps / config.steps))
                    given += [f"--{option.key}", str(scaled)]
            given += ["--steps", str(steps)]
        variant = Variant(cell.row.name, cell.row.settings)
        return Job(variant, cell.draw, folder, tuple(given), parse(given))

    def flops_of_step(self, row: Row) -> int:
        """As the dry run counts them; without losses and optimizers, which are below 1 %."""
        if row.name not in self._flops:
            import torch

            from mpl_fast import models
            from mpl_fast.config.command_line import parse
            from mpl_fast.dry_run.estimate import step_flops
            from mpl_fast.dry_run.network import measure
            from mpl_fast.training.rows import count

            given = ["--config", str(config_file(row)), "--data.root", "-", "--run-dir", "-"]
            given += ["--algorithm.start", "-"] if row.after else []
            config = parse([*given, *(f"--{setting}" for setting in row.settings)])
            network = models.build(config.model.name, classes=10)
            cost = measure(network, config.data.image_size, device=torch.device("cpu"), bf16=False)
            rows = count(
                config.algorithm, config.labeled_batch, config.unlabeled_images, steps=config.steps
            )
            self._flops[row.name] = step_flops(rows, cost)
        return self._flops[row.name]

    def result(self, cell: Cell) -> Json | None:
        """Of a run that has ended with the present settings, or None."""
        wanted = key_of(cell)
        return next((r for r in self.results if wanted.items() <= r.items()), None)

    def add(self, cell: Cell, job: Job, summary: Json) -> None:
        """Keeps the result of a run that has ended."""
        from mpl_fast.training.environment import environment
        from tools.bench.machine import describe

        flops, points = self.flops_of_step(cell.row), curve(job.folder)
        earlier, seconds = 0, summary["train_seconds"]
        if start := _start(cell):
            before = read_summary(self.job(start).folder)
            earlier = self.flops_of_step(start.row) * before["steps"]
            seconds += before["train_seconds"]
        key = key_of(cell)
        # An earlier one, of a run elsewhere, gives way.
        self.results = [r for r in self.results if not key.items() <= r.items()]
        self.results.append(
            {
                **key,
                **{key: summary[key] for key in KEYS},
                "train_seconds": seconds,
                "flops": earlier + flops * summary["steps"],
                "curve": [[earlier + flops * step, top1] for step, (_, top1) in points.items()],
                "machine": {key: describe()[key] for key in ("cpu", "cores", "gpu", "versions")},
                "commit": environment()["git_commit"],
            }
        )

    def write(self) -> str:
        """Writes cifar.json and cifar.md, each as a whole; returns the text of the latter."""
        write_json(self.out / "cifar.json", {"runs": self.results})
        text = "\n\n".join(
            f"## {labels:,} labels\n\n{table([r for r in self.results if r['labels'] == labels])}"
            for labels in sorted({r["labels"] for r in self.results}, reverse=True)
        )
        write_text(self.out / "cifar.md", f"# CIFAR-10\n\n{ABOUT_TABLE}\n\n{text}\n")
        return text


def table(results: Sequence[Json]) -> str:
    """Markdown: top-1 over draws, and the difference to another row in pairs of draws."""
    shares = sorted({*SHARES, *(Fraction(r["share"]) for r in results)})
    lines = []
    for row in ROWS:
        mine = _of(row, results)
        longest = max(mine, key=lambda r: r["flops"], default=None)
        cost = f"{longest['train_seconds']:.0f} s, {longest['flops']:.2g}" if longest else ""
        lines.append([f"`{row.name}`", *(_cell(results, row, share) for share in shares), cost])
    head = ["", *(f"{share}" for share in shares), "longest run: seconds, FLOPs"]
    return "\n".join(command.table(head, lines))


def _of(row: Row, results: Sequence[Json]) -> list[Json]:
    """Those of a row's present settings."""
    wanted = key_of(Cell(row, Fraction(1), 0, 0))
    same = ("row", "settings", "config_sha256")
    return [r for r in results if all(r[key] == wanted[key] for key in same)]


def _cell(results: Sequence[Json], row: Row, share: Fraction) -> str:
    mine, other = (
        {r["draw"]: r["top1"] for r in _of(one, results) if r["share"] == str(share)}
        for one in (row, BY_NAME[row.against])
    )
    if not mine:
        return ""
    text = f"{_spread(list(mine.values()), '.2f')} ({len(mine)})"
    pairs = [mine[draw] - other[draw] for draw in mine if draw in other]
    if pairs and row.name != row.against:
        text += f" [{row.against} {_spread(pairs, '+.2f', len(pairs) ** 0.5)}]"
    return text


def _read(file: Path) -> list[Json]:
    """The runs in a cifar.json. Raises `DataError` if it is not one of this version."""
    if not file.exists():
        return []
    runs = json_object(file).get("runs")
    needed = {*key_of(Cell(ROWS[0], Fraction(1), 1, 0)), *KEYS, "flops", "curve"}
    if not isinstance(runs, list) or not all(isinstance(r, dict) and needed <= {*r} for r in runs):
        raise DataError(f"{file} is damaged or of another version: mend it, or move it away")
    return runs


def _spread(values: Sequence[float], how: str, divisor: float = 1.0) -> str:
    mean = format(statistics.fmean(values), how)
    return f"{mean} ± {statistics.stdev(values) / divisor:.2f}" if len(values) > 1 else mean


def draw_picture(results: Sequence[Json], out: Path) -> None:
    """Writes cifar.png: the final top-1 over FLOPs, a curve a row, and in pale the course of a run
    with most FLOPs; `results` are those of one number of labels."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8.0, 4.5))
    for number, row in enumerate(ROWS):
        if not (mine := _of(row, results)):
            continue
        points = []
        for share in sorted({r["share"] for r in mine}, key=Fraction):
            found = [r for r in mine if r["share"] == share]
            top1 = [r["top1"] for r in found]
            sd = statistics.stdev(top1) if len(top1) > 1 else 0.0
            points.append((found[0]["flops"], statistics.fmean(top1), sd))
        x, y, bars = zip(*points, strict=True)
        color, marker = f"C{number % 10}", "o" if number < 10 else "s"
        axis.errorbar(x, y, bars, label=row.name, color=color, marker=marker, capsize=2)
        longest = max(mine, key=lambda r: (r["flops"], -r["draw"]))["curve"]
        axis.plot(*zip(*longest, strict=True), color=color, alpha=0.3, linewidth=1)
    axis.set(xlabel="FLOPs", ylabel="test top-1 (%)", xscale="log")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    with atomic_path(out / "cifar.png") as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)


def train_all(study: Study, cells: Sequence[Cell], jobs: int) -> int:
    """Trains the cells in their order, `jobs` at a time, and writes the table after each; returns
    how many failed. Raises KeyboardInterrupt, after Ctrl-C, once the runs have saved."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    waiting, shown, failed, number, stopped = [*cells], set[tuple[str, str]](), 0, 0, False
    running: dict[Future[Result], tuple[Cell, Job]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            busy = [cell for cell, _ in running.values()] + waiting
            ready = [cell for cell in waiting if _start(cell) not in busy]
            for cell in ready[: jobs - len(running)]:
                waiting.remove(cell)
                number += 1
                start = _start(cell)
                if start and not study.job(start).complete:
                    print(
                        f"{cell.text}: failed: it continues {start.text}, which has not ended in "
                        f"{study.out}: give --only {start.row.name} {cell.row.name}",
                        flush=True,
                    )
                    failed += 1
                    continue
                print(f"[{number}/{len(cells)}] {cell.text}: training", flush=True)
                job = study.job(cell)
                log = study.out / "logs" / f"{cell.folder.replace('/', '_')}.log"
                running[pool.submit(run, job, 1, log, shown)] = cell, job
            for done in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                cell, job = running.pop(done)
                result = done.result()
                if result.stopped:  # what stops one run is meant for the study
                    stopped, waiting = True, []
                    continue
                print(f"{cell.text}: {result.outcome}", flush=True)
                if result.summary:
                    study.add(cell, job, result.summary)
                failed += result.summary is None
                study.write()
    if stopped:
        raise KeyboardInterrupt
    return failed


def _start(cell: Cell) -> Cell | None:
    """The run that a cell continues."""
    return cell._replace(row=BY_NAME[cell.row.after]) if cell.row.after else None


def _share(text: str) -> Fraction:
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value <= 4:
        raise argparse.ArgumentTypeError(f"must be a share such as 1/4, at most 4, not {text!r}")
    return value


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser(prog="cifar", description=ABOUT, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--src",
        type=Path,
        required=True,
        help="CIFAR-10 as train/CLASS and test/CLASS: a folder or an archive",
    )
    add("--out", type=Path, required=True, help="folder for records, runs and results")
    add(
        "--only",
        nargs="+",
        choices=BY_NAME,
        metavar="NAME",
        default=[*BY_NAME],
        help="rows of the table (default: " + ", ".join(BY_NAME) + ")",
    )
    add(
        "--compute",
        type=_share,
        nargs="+",
        metavar="SHARE",
        default=[*SHARES],
        help=f"shares of {FULL:.1e} FLOPs, about an hour on two cores with AMX (1/8 1/4 1/2 1)",
    )
    add(
        "--draws",
        type=command.at_least(0),
        nargs="+",
        metavar="N",
        default=[0, 1, 2],
        help="draws of the labels, each with the seed of its number (0 1 2)",
    )
    add("--labels", type=command.at_least(10), default=4000, metavar="N", help="(%(default)s)")
    add(
        "--jobs",
        type=command.at_least(1),
        default=1,
        metavar="N",
        help="runs side by side, each with its share of the cores for PyTorch (%(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains the cells that have no result yet, those of few FLOPs first."""
    options = _options(arguments)
    if not options.src.exists():
        raise DataError(f"--src {options.src} does not exist")
    study = Study(options.src, options.out)
    cells = [
        Cell(row, share, options.labels, draw)
        for share in sorted(set(options.compute))
        for draw in dict.fromkeys(options.draws)
        for row in ROWS
        if row.name in options.only
    ]
    with output_errors(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        missing = [cell for cell in cells if not study.result(cell)]
        # Those with a result, too, that another is to continue and whose run is not here.
        starts = {cell for cell in map(_start, missing) if cell and not study.job(cell).complete}
        waiting = [cell for cell in cells if cell in missing or cell in starts]
        print(f"{len(cells) - len(waiting)} of {len(cells)} runs have ended already", flush=True)
        try:
            failed = train_all(study, waiting, options.jobs)
        except KeyboardInterrupt:
            sys.exit("cifar: interrupted; the same command continues from what is saved")
        print(f"\n{study.write()}\n")
        files = ["cifar.json", "cifar.md"]
        if shown := [r for r in study.results if r["labels"] == options.labels]:
            try:
                draw_picture(shown, options.out)
                files.append("cifar.png")
            except ModuleNotFoundError as error:
                advice = f"{error.name} is missing: pip install {error.name}"
                print(f"no picture: {advice}", file=sys.stderr)
    print(*(options.out / name for name in files), sep="\n")
    return int(failed > 0)


if __name__ == "__main__":
    run_command("cifar", main)
