"""The parity step replays recorded trajectories to rounding, and no wrong number gets past it."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpl_fast.experiments.replay import main
from mpl_fast.experiments.replay_file import NUMBERS
from tests.kekmodel_by_hand import recorded

GOLDEN = Path(__file__).parent / "golden" / "kekmodel_steps.json"
RUN = "bn=True,sign=kekmodel"
KNOBS: dict[str, dict[str, Any]] = {
    "plain SGD, no warm-up": {
        "momentum": 0.0, "nesterov": False, "wd": 0.0, "ls": 0.0, "wait": 0, "warmup": 0,
    },
    "heavy ball, clipped": {"nesterov": False, "clip": 0.3},
    "no clip, no average, no ramp": {"clip": 0, "ema": 0, "uda_steps": 0},
    "nobody is sure": {"thr": 1.5, "lam": 1e6},
    "wide and long": {
        "D": 11, "H": 16, "C": 7, "BL": 9, "mu": 5, "steps": 20, "total_steps": 30, "wait": 4,
    },
    "beyond the schedule": {"steps": 6, "total_steps": 4},
}  # fmt: skip


def replay(path: Path, content: Any) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    main([str(path)])


def refused(path: Path, content: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code, and the one line that says why."""
    with pytest.raises(SystemExit) as stopped:
        replay(path, content)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, lines[0]


def largest(printed: str) -> float:
    found = re.findall(r"largest relative difference (\S+)", printed)
    assert len(found) == 1
    return float(found[0])


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """One run of the recorded file."""
    content: dict[str, Any] = json.loads(GOLDEN.read_text())
    content["runs"] = {RUN: content["runs"][RUN]}
    return content


def test_recorded_runs_replay_to_rounding(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(GOLDEN)])
    printed = capsys.readouterr().out
    assert "; 4 runs" in printed
    assert largest(printed) < 1e-13


@pytest.mark.parametrize("name", KNOBS)
def test_other_sizes_and_knobs_replay(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replay(tmp_path / "steps.json", recorded(**KNOBS[name]))
    printed = capsys.readouterr().out
    assert "; 4 runs" in printed
    assert largest(printed) < 1e-11


def test_the_clip_of_these_knobs_is_active_for_both_networks() -> None:
    content = recorded(**KNOBS["heavy ball, clipped"])
    log = [row for run in content["runs"].values() for row in run["log"]]
    assert min(row["s_grad_norm"] for row in log) > 0.3
    assert min(row["t_grad_norm"] for row in log) > 0.3


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000),
    changed=st.fixed_dictionaries(
        {
            "D": st.integers(1, 6),
            "H": st.integers(2, 9),
            "C": st.integers(2, 5),
            "BL": st.integers(3, 6),
            "mu": st.integers(1, 4),
            "warmup": st.integers(0, 4),
            "wait": st.integers(0, 4),
            "momentum": st.sampled_from([0.5, 0.9]),
            "nesterov": st.booleans(),
            "wd": st.sampled_from([0.0, 0.01]),
            "ls": st.sampled_from([0.0, 0.2]),
            "T": st.sampled_from([0.3, 1.0, 2.0]),
            "thr": st.sampled_from([0.0, 0.5, 0.9]),
            "clip": st.sampled_from([0.0, 0.1, 1.0, 1e9]),
            "ema": st.sampled_from([0.0, 0.5, 0.995]),
        }
    ),
)
def test_any_knobs_replay(
    seed: int, changed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    replay(tmp_path_factory.mktemp("any") / "steps.json", recorded(seed, steps=4, **changed))


@pytest.mark.parametrize("key", [k for k in NUMBERS if k != "step"])
def test_a_perturbed_log_value_is_found(
    key: str, golden: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = copy.deepcopy(golden)
    content["runs"][RUN]["log"][5][key] += 1e-8
    code, line = refused(tmp_path / "steps.json", content, capsys)
    assert code == 1
    assert f"{RUN}, step 5: {key} is " in line


@pytest.mark.parametrize("key", ["fc1.weight", "bn1.running_var", "bn1.num_batches_tracked"])
@pytest.mark.parametrize("network", ["teacher", "student", "ema"])
def test_a_perturbed_last_weight_is_found(
    network: str,
    key: str,
    golden: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = copy.deepcopy(golden)
    final = content["runs"][RUN][f"{network}_final"]
    if key == "fc1.weight":
        final[key][6][4] += 1e-9
    elif key == "bn1.running_var":
        final[key][6] += 1e-9
    else:
        final[key] += 1
    code, line = refused(tmp_path / "steps.json", content, capsys)
    assert code == 1
    assert f"{RUN}, after step 7, {key}: {network}_final is " in line


def test_other_labels_sums_and_signs_are_found(
    golden: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label, total = copy.deepcopy(golden), copy.deepcopy(golden)
    hard = label["runs"][RUN]["log"][2]["hard"]
    hard[11] = (hard[11] + 1) % 3
    total["runs"][RUN]["log"][4]["ema_sum_sumsq"][1] *= 1 + 1e-9
    sign = {**golden, "runs": {"bn=True,sign=correct": golden["runs"][RUN]}}
    for content, words in (
        (label, "step 2: hard is "),
        (total, "step 4: ema_sum_sumsq is "),
        (sign, "bn=True,sign=correct, step 0: dot_product is -0.29"),
    ):
        code, line = refused(tmp_path / "steps.json", content, capsys)
        assert code == 1
        assert words in line


def without(*path: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def with_(value: Any, *path: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("cfg"), "cfg is missing"),
        (without("cfg", "uda_steps"), "cfg.uda_steps is missing"),
        (with_(-1, "cfg", "momentum"), "cfg.momentum must lie in [0.0, 1.0], not be -1.0"),
        (with_("yes", "cfg", "nesterov"), "cfg.nesterov must be true or false"),
        (with_(7.5, "cfg", "H"), "cfg.H must be a whole number"),
        (with_(8, "cfg", "H"), "data.teacher[0] must have shape (8, 5), not (7, 5)"),
        (without("data", "student", 3), "data.student must be a list of 4"),
        (without("data", "batches", 7), "data.batches must be a list of 8 (cfg.steps), not of 7"),
        (without("data", "batches", 1, "xs"), "data.batches[1].xs is missing"),
        (without("data", "batches", 1, "xl", 0, 0), "data.batches[1].xl must have shape (4, 5)"),
        (with_([0, 1, 2, 3], "data", "batches", 0, "y"), "data.batches[0].y must be classes from"),
        (with_(float("nan"), "data", "batches", 0, "xl", 0, 0), "xl must be finite numbers"),
        (with_("a", "data", "batches", 0, "xl", 0, 0), "xl must be numbers of shape (4, 5)"),
        (with_(1, "cfg", "BL"), "data.batches[0].xl must have shape (1, 5)"),
        (with_({}, "runs"), "runs is empty"),
        (with_({"bn=True": {}}, "runs"), "runs[bn=True] must be named"),
        (without("runs", RUN, "log", 3, "t_loss"), f"runs[{RUN}].log[3].t_loss is missing"),
        (with_(None, "runs", RUN, "log", 3, "t_grad_norm"), "t_grad_norm must be a number"),
        (with_(3, "runs", RUN, "log", 3), "log[3] must be an object that has step"),
        (without("runs", RUN, "ema_final"), f"runs[{RUN}].ema_final is missing"),
        (without("runs", RUN, "teacher_final", "bn1.bias"), "teacher_final.bn1.bias is missing"),
    ],
)
def test_a_bad_file_is_told_by_its_key(
    change: Callable[[Any], None],
    words: str,
    golden: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = copy.deepcopy(golden)
    change(content)
    code, line = refused(tmp_path / "steps.json", content, capsys)
    assert code == 2
    assert words in line


def test_batch_norm_of_one_row_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = recorded(BL=2, mu=1, steps=1)
    one["cfg"]["BL"], one["cfg"]["mu"] = 1, 2
    batch = one["data"]["batches"][0]
    batch["xl"], batch["y"] = batch["xl"][:1], batch["y"][:1]
    code, line = refused(tmp_path / "steps.json", one, capsys)
    assert code == 2
    assert "runs[bn=True,sign=kekmodel] cannot be: batch norm needs" in line


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\ufffe"])
def test_what_is_no_trajectory_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = refused(tmp_path / "steps.json", text, capsys)
    assert code == 2
    assert "steps.json" in line


def test_norm_momentum_can_be_another(
    golden: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(golden))
    with pytest.raises(SystemExit) as stopped:
        main([str(path), "--norm-momentum", "0.1"])
    assert stopped.value.code == 1
    assert "after step 7, bn1.running_mean: teacher_final is " in capsys.readouterr().err


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mpl_fast.experiments.replay"]
    root = GOLDEN.parents[2]
    ended = [
        subprocess.run([*command, *options], cwd=root, capture_output=True, text=True)
        for options in (["--help"], [str(tmp_path / "none.json")], [], [str(GOLDEN), "--no"])
    ]
    assert [done.returncode for done in ended] == [0, 2, 2, 2]
    assert "FILE.json" in ended[0].stdout
    assert ended[1].stderr.splitlines() == [
        f"replay: error: {tmp_path}/none.json: No such file or directory"
    ]


def test_quantities_that_are_not_computed_are_named(
    golden: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = copy.deepcopy(golden)
    content["runs"][RUN]["log"][1]["entropy"] = 1.0
    replay(tmp_path / "steps.json", content)
    assert "not compared: entropy" in capsys.readouterr().out
