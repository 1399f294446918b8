"""What a kill or another program leaves in a folder is one line or left out, for every tool."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from optuna.trial import TrialState

from mpl_fast.config.command_line import as_yaml, parse
from mpl_fast.errors import DataError
from mpl_fast.sweep import process
from mpl_fast.training.status import table
from tools import demo
from tools.bench.all import bench_json
from tools.bench.compare import _results
from tools.faults.cases import read_cases
from tools.first_gpu import summary as first_gpu
from tools.studies.ablation import run as ablation
from tools.studies.ablation.plan import Job, Variant

SOUND = {"top1": 50.0, "steps": 9, "train_seconds": 2.0, "images_per_second": 3.0}
DAMAGED = {
    "empty": b"",
    "cut": b'{"top1": 50.0, "st',
    "no UTF-8": b"\xff",
    "deep": b"[" * 100_000,
    "list": b"[1]",
    "number": b"3",
    "no numbers": b'{"top1": "50", "steps": [], "train_seconds": {}, "images_per_second": null}',
    "too large": json.dumps(SOUND | {"steps": 10**400}).encode(),
    "parts missing": b'{"top1": 50.0}',
    "other forms": b'{"form": "mpl_fast.first_gpu_run/1", "steps": [{"found": 3}], "name": 1}',
    "other rows": b'{"form": "mpl_fast.bench/1", "bench": "a", "machine": {}, "settings": {}, '
    b'"rows": [{"name": [], "unit": [], "better": 1, "steady": 0, "median": 1, "low": 1, '
    b'"high": 1}]}',
}


def in_demo(folder: Path, content: bytes) -> None:
    (folder / "mpl_seed0").mkdir()
    (folder / "mpl_seed0/summary.json").write_bytes(content)
    demo._over_seeds([demo._result(folder / "mpl_seed0")])


def in_ablation(folder: Path, content: bytes) -> None:
    config = parse(
        ["--recipe", "supervised", "--steps", "9", "--data.root", "rec", "--run-dir", "x"]
    )
    job = Job(Variant("a", ()), 0, folder, (), config)
    (folder / "summary.json").write_text(json.dumps(SOUND))
    (folder / "config.yaml").write_text(as_yaml(config))
    assert job.complete
    (folder / "config.yaml").write_bytes(content)
    assert not job.complete
    (folder / "config.yaml").write_text(as_yaml(config))
    (folder / "summary.json").write_bytes(content)
    assert not job.complete
    result = ablation.run(job, 1, folder / "log", set())
    assert result.outcome == "failed: ended without a sound summary.json, see log"


def in_sweep(folder: Path, content: bytes) -> None:
    (folder / "train.py").touch()
    (folder / "summary.json").write_bytes(content)
    (folder / "config.yaml").write_bytes(content)
    (folder / "metrics.jsonl").write_bytes(content + b'\n{"step": 3, "eval/top1": 9.0}\n')
    stored = SimpleNamespace(get_trial=lambda _: SimpleNamespace(intermediate_values={}))
    trial = SimpleNamespace(
        number=0, storage=stored, _trial_id=0, report=lambda *_: None, should_prune=bool
    )
    with (folder / ".worker").open("a") as lock:
        claim = cast(Any, SimpleNamespace(trial=trial, lock=lock))
        training = process.Training(claim, folder, [], 1, os.environ)
        training.wait()
    outcome = training.outcome()
    assert outcome and outcome.state == TrialState.FAIL and training.latest == (3, 9.0)
    assert outcome.reason == f"{folder}/summary.json is missing or damaged"


def in_first_gpu(folder: Path, content: bytes) -> None:
    for name in ("env.json", "summary.json", "bench_step.json"):
        (folder / name).write_bytes(content)
    assert first_gpu.Summary(folder, ["bench_step"], []).bad(["bench_step"]) == []
    (folder / "train").mkdir()
    (folder / "train/metrics.jsonl").write_bytes(
        content + b'\n{"step": 3, "images_per_second": 2.0}\n'
    )
    assert first_gpu.found_by("train", folder) == ("1 rows up to step 3",)


def in_status(folder: Path, content: bytes) -> None:
    for name in ("status.json", "config.yaml", "metrics.jsonl"):
        (folder / name).write_bytes(content)
    assert "unknown" in table([folder])


def in_bench(folder: Path, content: bytes) -> None:
    (folder / "step.json").write_bytes(content)
    bench_json(folder, "step")
    assert _results(folder) == {}


def in_faults(folder: Path, content: bytes) -> None:
    (folder / "cases.jsonl").write_bytes(content + b"\n")
    read_cases(folder / "cases.jsonl")
    assert not content


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize(
    "use", [in_demo, in_ablation, in_sweep, in_first_gpu, in_status, in_bench, in_faults]
)
def test_a_damaged_file_is_one_line_or_left_out(
    use: Callable[[Path, bytes], None],
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo, "_run", lambda *_: None)
    monkeypatch.setattr(ablation, "_train", lambda *_: ("", 0))
    monkeypatch.setattr(process, "TRAIN", tmp_path / "train.py")
    try:
        use(tmp_path, DAMAGED[kind])
    except DataError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error)
