"""The feedbacks study: its results on a few problems, its files and its errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mpl_fast.kernels import reference
from tests.tiny_run import run_here
from tools.studies.feedbacks import __main__ as feedbacks
from tools.studies.feedbacks import measure
from tools.studies.feedbacks.problems import KINDS, gradients, meta_gradient, problem

FEW = measure.Options(problems=4, drawn=2, draws=300, sizes=(8,))


@pytest.mark.slow
def test_files_hold_every_feedback(tmp_path: Path) -> None:
    done = run_here(lambda: feedbacks.main(["--smoke", "--out", str(tmp_path)]), [])
    assert done.returncode == 0, done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"feedbacks.json", "feedbacks.md"}
    found: dict[str, Any] = json.loads((tmp_path / "feedbacks.json").read_text(encoding="utf-8"))
    assert found["format"] == "mpl_fast.feedbacks/2"
    assert set(found["nearness"]) == set(KINDS) - {"off"}
    assert set(found["passes"]) == set(found["time"]["relative"]) == set(KINDS)
    assert set(found["nearness"]["exact"]) == {"4", "16", "64", "256"}
    assert all(row["error"] < 1e-12 for row in found["nearness"]["exact"].values())
    assert found["time"]["relative"]["off"] == {"low": 1.0, "median": 1.0, "high": 1.0}
    text = (tmp_path / "feedbacks.md").read_text(encoding="utf-8")
    for kind in KINDS.values():
        assert f"| {kind.title} |" in text and (kind.title == "off" or kind.title in done.stdout)


def test_exact_is_near_and_the_published_ones_are_not() -> None:
    near = {
        name: measure.nearness(KINDS[name], 8, FEW)
        for name in ("exact", "exact_central", "parity_google", "parity_kekmodel", "difference")
    }
    errors = {name: row.error for name, row in near.items()}
    assert errors["exact"] is not None and errors["exact"] < 1e-12
    assert errors["exact_central"] is not None and errors["exact_central"] < 0.05
    assert near["exact_central"].cosine > 0.999
    assert near["parity_google"].cosine == 0.0
    assert errors["parity_google"] == pytest.approx(1.0, abs=1e-9)  # its gradient is 0
    assert near["parity_kekmodel"].cosine < near["difference"].cosine


@pytest.mark.slow
def test_drawn_labels_are_right_on_average() -> None:
    per_example = measure.nearness(KINDS["per_example"], 8, FEW)
    sampled = measure.nearness(KINDS["sampled"], 8, FEW)
    assert per_example.size == pytest.approx(1.0, abs=0.15)
    assert per_example.noise is not None and sampled.noise is not None
    assert sampled.noise > 1.5 * per_example.noise > 0.1
    assert 0.5 < per_example.positive <= 1.0 and per_example.error is None


def test_the_exact_gradient_is_no_function_of_the_algorithms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the comparison would find any mistake right."""
    given = problem(0, 0, 8, 2.0)
    before = meta_gradient(given)
    monkeypatch.setattr(
        reference, "exact_feedback", lambda x, *args, **options: 2.0 * x.sum() * 0.0
    )
    assert torch.equal(meta_gradient(given), before)
    (found,) = gradients(KINDS["exact"], given, 1)
    assert found.norm() < 1e-12


def test_passes_are_counted() -> None:
    counted = {name: measure.passes(KINDS[name])["student"] for name in KINDS}
    assert counted["off"] == {
        "forward": {"unlabeled": 1, "labeled": 1},
        "backward": {"unlabeled": 1},
        "jvp": {},
    }
    assert counted["exact"]["jvp"] == {"unlabeled": 1}
    assert counted["exact"]["backward"] == {"unlabeled": 1, "labeled": 1}
    assert counted["exact_central"]["forward"] == {"unlabeled": 3, "labeled": 1}
    assert counted["difference"]["forward"] == {"labeled": 2, "unlabeled": 1}
    assert counted["parity_kekmodel"]["forward"] == {"together": 1, "labeled": 1}


def test_times_are_compared_within_a_round() -> None:
    found = measure.relative({"off": [1.0, 2.0, 4.0], "exact": [1.5, 4.0, 10.0]})
    assert found["exact"] == {"low": 1.75, "median": 2.0, "high": 2.25}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--draws", "1"], 2, "--draws: must be a whole number of at least 2, not '1'"),
        (["--problems", "many"], 2, "--problems: must be a whole number of at least 1, not 'many'"),
        (["--scale", "0"], 2, "--scale: must be a number above 0, not '0'"),
        (["--problem", "3"], 2, "unrecognized arguments: --problem"),
        (["--problems", "3", "--drawn", "4"], 2, "--drawn 4 is more than --problems 3"),
        (["--out", "FILE"], 3, "is a file; name a folder"),
        (["--out"], 2, "--out: expected one argument"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], code: int, message: str, tmp_path: Path) -> None:
    file, out = tmp_path / "file", tmp_path / "out"
    file.touch()
    line = ["--out", str(out), *(o.replace("FILE", str(file)) for o in options)]
    done = run_here(lambda: feedbacks.main(line), [])
    assert done.returncode == code and done.stderr.count("\n") == 1
    assert done.stderr.startswith("feedbacks: error: ") and message in done.stderr
    assert not out.exists()
