"""Packs, plans and trains the runs of the study of CIFAR-10, and keeps their results."""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from fractions import Fraction
from pathlib import Path

from mpl_fast.atomic import write_json, write_text
from mpl_fast.errors import DataError
from mpl_fast.training.curves import read_summary
from mpl_fast.untrusted import json_object
from tools.studies.ablation.picture import curve
from tools.studies.ablation.plan import Job, Variant
from tools.studies.ablation.run import Result, run
from tools.studies.cifar import plan
from tools.studies.cifar.plan import ROOT, Cell, Json, Row, config_file, key_of, start_of
from tools.studies.cifar.report import ABOUT_TABLE, table

SCHEDULED = ("warmup", "ramp", "feedback_ramp", "delay_steps", "eval_every", "checkpoint_every")
"""Options in steps, which are scaled with the length of a run."""
KEYS = ("top1", "steps", "train_seconds", "images_per_second")  # of a run's summary.json


class Study:
    """Packs, plans, trains and tabulates; results are kept in OUT/cifar.json."""

    def __init__(self, src: Path, out: Path, jobs: int = 1) -> None:
        """`jobs`: runs that train side by side and share the cores."""
        self.src, self.out, self.jobs = src, out.resolve(), jobs
        self.threads = max(1, len(os.sched_getaffinity(0)) // jobs)
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
        given += ["--data.threads", str(self.threads)]
        given += [f"--{setting}" for setting in row.settings]
        if row.after:
            start = self.out / cell._replace(row=plan.BY_NAME[row.after]).folder
            given += ["--algorithm.start", str(start)]
        # Late: PyTorch takes seconds, which --help does not need.
        from mpl_fast.config.command_line import parse
        from mpl_fast.config.fields import all_options

        config = parse(given)
        if not row.after:  # else as long as configured
            steps = max(1, round(float(cell.share) * plan.FULL / self.flops_of_step(row)))
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

    def of_other_settings(self, cell: Cell) -> bool:
        """Whether there is a result of the cell, of a time when its row had another config."""
        same = {key: key_of(cell)[key] for key in ("row", "share", "labels", "draw")}
        return any(same.items() <= r.items() for r in self.results)

    def add(self, cell: Cell, job: Job, summary: Json) -> None:
        """Keeps the result of a run that has ended."""
        from mpl_fast.training.environment import environment
        from tools.bench.machine import describe

        flops, points = self.flops_of_step(cell.row), curve(job.folder)
        earlier, seconds = 0, summary["train_seconds"]
        if start := start_of(cell):
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


def train_all(study: Study, cells: Sequence[Cell]) -> int:
    """Trains the cells in their order, and writes the table after each; returns how many failed.
    Raises KeyboardInterrupt, after Ctrl-C, once the runs have saved."""
    os.environ["OMP_NUM_THREADS"] = str(study.threads)
    waiting, shown, failed, number, stopped = [*cells], set[tuple[str, str]](), 0, 0, False
    running: dict[Future[Result], tuple[Cell, Job]] = {}
    with ThreadPoolExecutor(study.jobs) as pool:
        while waiting or running:
            busy = [cell for cell, _ in running.values()] + waiting
            ready = [cell for cell in waiting if start_of(cell) not in busy]
            for cell in ready[: study.jobs - len(running)]:
                waiting.remove(cell)
                number += 1
                start = start_of(cell)
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


def _read(file: Path) -> list[Json]:
    """The runs in a cifar.json. Raises `DataError` if it is not one of this version."""
    if not file.exists():
        return []
    runs = json_object(file).get("runs")
    needed = {*key_of(Cell(plan.ROWS[0], Fraction(1), 1, 0)), *KEYS, "flops", "curve"}
    if not isinstance(runs, list) or not all(isinstance(r, dict) and needed <= {*r} for r in runs):
        raise DataError(f"{file} is damaged or of another version: mend it, or move it away")
    return runs
