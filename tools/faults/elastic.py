"""Accuracy of runs whose number of ranks changes, 2 -> 1 -> 2, against runs that never stop."""

import subprocess
import sys
import time
from pathlib import Path

from mpl_fast.training.curves import read_summary
from tests import tiny_run
from tools.demo import write_digits
from tools.faults.cases import Campaign, Case

CONFIG = tiny_run.ROOT / "configs" / "demo_uda.yaml"
SESSIONS = ((2, 100), (1, 200), (2, 0))  # ranks, and the step to stop at


def run_elastic(campaign: Campaign, seeds: int) -> None:
    """Trains both kinds of runs with each seed, then compares them. What is complete is kept."""
    campaign.run(f"2 -> 1 -> 2 ranks, {seeds} seeds", lambda: one_case(campaign.out, seeds))


def one_case(out: Path, seeds: int) -> Case:
    """Passes if the mean of the changed runs is within the range of those that never stop."""
    began, folder = time.monotonic(), out / "elastic"
    rec = folder / "rec"
    if not (rec / "manifest.json").exists():
        images = write_digits(folder / "images")
        command = [sys.executable, tiny_run.ROOT / "tools" / "make_rec.py", "pack", "--quiet"]
        command += ["--src", images / "train", "--val", images / "val", "--labeled", "50"]
        subprocess.run([str(part) for part in (*command, "--out", rec)], check=True)
    top1 = {
        name: [trained(folder / f"{name}_{seed}", rec, seed, sessions) for seed in range(seeds)]
        for name, sessions in (("never_stopped", SESSIONS[-1:]), ("changed", SESSIONS))
    }
    mean = sum(top1["changed"]) / seeds
    inside = min(top1["never_stopped"]) <= mean <= max(top1["never_stopped"])
    reason = "" if inside else f"the mean of changed runs, {mean:.2f} %, is out of range"
    seconds = time.monotonic() - began
    outcome = "passed" if inside else "failed"
    return Case(f"2 -> 1 -> 2 ranks, {seeds} seeds", "elastic", outcome, seconds, 0, reason, top1)


def trained(run: Path, rec: Path, seed: int, sessions: tuple[tuple[int, int], ...]) -> float:
    """Top-1 in % of a run in one session for each number of ranks."""
    for ranks, stop_at in sessions:
        if read_summary(run):
            break
        options = ["--config", str(CONFIG), "--data.root", str(rec), "--run-dir", str(run)]
        options += ["--seed", str(seed), "--stop-at", str(stop_at)]
        with (run.parent / f"{run.name}.log").open("a") as log:
            command = tiny_run.command(options, ranks)
            subprocess.run(command, stdout=log, stderr=log, check=True, env=tiny_run.environment())
    return float(read_summary(run)["top1"])
