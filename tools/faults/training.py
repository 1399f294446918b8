"""Random SIGKILLs of training: what is resumed ends bit for bit as what was never stopped.

Some cases continue on another number of ranks after each kill: these have no equal to compare with,
but must end, with every evaluation, every row once and finite values.
"""

import random
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mpl_fast.training.curves import read_summary
from tests import tiny_run
from tools.faults.cases import Campaign, Case
from tools.faults.processes import descendants, ended, kill, orphans, started

STEPS = 40
RECIPES = ("mpl", "uda", "fixmatch", "smpl", "mpl exact", "mpl_roleplay", "metasemi", "supervised")
TARGETS = ("launcher", "worker", "all")
PHASES = ("steps", "save", "evaluation", "resume")
MOST = 3  # kills of one case
CHANGING = 0.25  # share of cases whose number of ranks changes
# Not equal in equal runs: durations, and Python's generator, which nothing seeds or draws from.
UNEQUAL = ("train_seconds", "python", "seconds", "images_per_second", "data_wait")
POLL = 0.002  # seconds


def plan(seed: int, ranks: tuple[int, ...], recipes: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Cases without end: recipe and ranks in turn; what is killed, and when, at random.

    `ranks` of a case: of the session of each kill, and of the last.
    """
    number = 0
    while True:
        drawn = random.Random(f"{seed} {number}")
        kills = [
            {
                "target": drawn.choice(TARGETS),
                "phase": drawn.choice(PHASES),
                "step": drawn.randrange(1, STEPS),
                "delay": drawn.random() ** 2,  # seconds; short ones are more frequent
            }
            for _ in range(drawn.randint(1, MOST))
        ]
        changing = drawn.random() < CHANGING
        yield {
            "name": f"kill {number:04d}",
            "recipe": recipes[number // len(ranks) % len(recipes)],
            "ranks": [ranks[(number + changing * at) % len(ranks)] for at in range(len(kills) + 1)],
            "kills": [{**kill, "rank": drawn.randrange(max(ranks))} for kill in kills],
        }
        number += 1


def run_kills(
    campaign: Campaign,
    rec: Path,
    most: int,
    seed: int,
    ranks: tuple[int, ...],
    recipes: tuple[str, ...],
) -> None:
    """Cases until there are as many SIGKILLs, or the time is over."""
    for planned in plan(seed, ranks, recipes):
        if campaign.kills("kills") >= most or campaign.time_is_over:
            return
        campaign.run(planned["name"], partial(one_case, campaign.out, rec, planned))


def one_case(out: Path, rec: Path, planned: Mapping[str, Any]) -> Case:
    """Kills a run as planned, lets it end, and compares it with one that nobody has stopped."""
    began, kills, faults = time.monotonic(), 0, list[str]()
    *killed_ranks, last_ranks = planned["ranks"]
    expected = reference(out, rec, planned["recipe"], last_ranks)
    folder = out / "runs" / planned["name"].replace(" ", "_")
    log = folder.parent / f"{folder.name}.log"
    for ranks, one in zip(killed_ranks, planned["kills"], strict=True):
        command = command_of(folder, rec, planned["recipe"], ranks)
        killed, left = killed_run(command, folder, log, one)
        kills += killed
        if left:
            faults.append(f"{len(left)} processes outlived a kill of the {one['target']}")
    command = command_of(folder, rec, planned["recipe"], last_ranks)
    code = ended(started(command, log, tiny_run.environment()))
    if code != 0:
        faults.append(f"the run ended with {'no code in time' if code is None else code}")
    else:
        faults += differences(expected, folder, bitwise={*killed_ranks} == {last_ranks})
    outcome = "failed" if faults else "passed"
    if not faults:
        log.unlink()  # of a failed case, log and run stay
        shutil.rmtree(folder)
    seconds = time.monotonic() - began
    return Case(planned["name"], "kills", outcome, seconds, kills, "; ".join(faults), dict(planned))


def command_of(folder: Path, rec: Path, recipe: str, ranks: int) -> list[str]:
    """What a user types."""
    options = tiny_run.arguments(folder, rec, recipe=recipe)
    options += ["--steps", str(STEPS), "--log-every", "1", "--eval-every", "7"]
    return tiny_run.command([*options, "--checkpoint-every", "5"], ranks)


def reference(out: Path, rec: Path, recipe: str, ranks: int) -> Path:
    """The run without a stop, trained once."""
    folder = out / "references" / f"{recipe.replace(' ', '_')}_{ranks}"
    if not (folder / "summary.json").exists():
        command = command_of(folder, rec, recipe, ranks)
        log = folder.parent / f"{folder.name}.log"
        if (code := ended(started(command, log, tiny_run.environment()))) != 0:
            raise RuntimeError(f"the run without a stop ended with {code}: {folder}.log")
    return folder


def killed_run(
    command: list[str], folder: Path, log: Path, one: Mapping[str, Any]
) -> tuple[int, list[int]]:
    """Starts the run and kills a part of it; how many kills that was (0: it had ended before), and
    the processes that stayed."""
    process = started(command, log, tiny_run.environment())
    wait_for(process, folder, one)
    if process.poll() is not None:
        return 0, []
    family = descendants(process.pid)
    workers = [pid for pid in family if is_rank(pid)] or family
    targets = {
        "launcher": [process.pid],
        "worker": [workers[one["rank"] % len(workers)]] if workers else [process.pid],
        "all": [process.pid, *family],
    }[one["target"]]
    kill(targets)
    left = orphans([pid for pid in family if pid not in targets]) if process.pid in targets else []
    ended(process)
    return 1, left + orphans(family)


def wait_for(process: "subprocess.Popen[bytes]", folder: Path, one: Mapping[str, Any]) -> None:
    """Returns at the moment of a kill, or when the process has ended."""
    rows, before = folder / "metrics.jsonl", lines(folder / "metrics.jsonl")
    partial_ = folder / "checkpoints"

    def reached() -> bool:
        if one["phase"] == "save":
            return any(partial_.glob(".writing_*"))
        if one["phase"] == "resume":
            return True
        done = lines(rows)
        if one["phase"] == "evaluation":  # the row before one
            return done > before and done % 7 == 6
        return done > min(before, STEPS - 2) and done >= min(one["step"], STEPS - 1)

    while process.poll() is None and not reached():
        time.sleep(POLL)
    # Of a start most is imports; a save takes some ms, a step even less.
    span = {"resume": 12.0, "save": 0.05, "evaluation": 0.1, "steps": 0.2}[one["phase"]]
    deadline = time.monotonic() + span * one["delay"]
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(POLL)


def lines(file: Path) -> int:
    """Of a file that may be missing."""
    try:
        return file.read_bytes().count(b"\n")
    except OSError:
        return 0


def is_rank(pid: int) -> bool:
    """Whether a process is train.py itself."""
    try:
        return b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def differences(
    expected: Path, folder: Path, *, bitwise: bool = True, steps: int = STEPS
) -> list[str]:
    """In what two complete runs differ: every tensor, state and row, but for durations; without
    `bitwise`, in their steps, and values that are not finite."""
    found = []
    last = f"checkpoints/step_{steps:08d}"
    for file in sorted(((expected if bitwise else folder) / last).glob("*.pt")):
        state = torch.load(folder / last / file.name, weights_only=True)
        if bitwise:
            other = torch.load(file, weights_only=True)
            found += [f"{file.name}: {key} differs" for key in unequal(other, state)]
        else:
            found += [f"{file.name}: {key} is not finite" for key in not_finite(state)]
    rows = [tiny_run.rows(path) for path in (expected, folder)]
    kept = [{row["step"]: evaluation(row) for row in r if "eval/top1" in row} for r in rows]
    if kept[0] != kept[1] if bitwise else [*kept[0]] != [*kept[1]]:
        found.append("metrics.jsonl: evaluations differ")
    trained = [row["step"] for row in rows[1] if "train_seconds" in row]
    if trained != [*range(1, steps + 1)]:
        found.append("metrics.jsonl: not each step is there once")
    one, other = (read_summary(path).get("top1") for path in (expected, folder))
    if one is None or other is None or (bitwise and one != other):
        found.append("summary.json: top1 differs")
    return found[:5]


def evaluation(row: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracies in a row."""
    return {key: value for key, value in row.items() if key.startswith("eval/")}


def not_finite(state: Any, name: str = "") -> list[str]:
    """Names of tensors with NaN or infinity."""
    if isinstance(state, torch.Tensor):
        return [] if not state.is_floating_point() or state.isfinite().all() else [name]
    if isinstance(state, list | tuple):
        state = dict(enumerate(state))
    parts = state.items() if isinstance(state, dict) else ()
    return [bad for key, part in parts for bad in not_finite(part, f"{name}.{key}".lstrip("."))]


def unequal(one: Any, other: Any, name: str = "") -> list[str]:
    """Names of values that are not bitwise equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{name}.{key}" for key in one.keys() ^ other.keys()]
        for key in one.keys() & other.keys():
            if key not in UNEQUAL:
                found += unequal(one[key], other[key], f"{name}.{key}".lstrip("."))
        return found
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [key for at, pair in pairs for key in unequal(*pair, f"{name}[{at}]")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return [name]
        # As bytes: NaN is equal to itself, 0 is not -0.
        same = (
            one.contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .equal(other.contiguous().reshape(-1).view(torch.uint8))
        )
        return [] if same else [name]
    return [] if type(one) is type(other) and one == other else [name]
