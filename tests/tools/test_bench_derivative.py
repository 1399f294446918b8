"""The benchmark of the derivative: which variants are rejected, rows; never a time."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mpl_fast import losses, models
from mpl_fast.kernels import reference
from mpl_fast.kernels.outputs import Dual
from tools.bench import derivative
from tools.bench.backbone import Problem
from tools.bench.derivative import CENTRAL, FUSED, PASSES, PYTORCH
from tools.bench.harness import Report


def test_rows_of_known_times() -> None:
    seconds = {FUSED: [0.001, 0.002], PYTORCH: [0.002, 0.006], PASSES: [0.001, 0.001]}
    made = derivative.rows("n", seconds)
    assert [(row.name, row.found.median, row.unit) for row in made] == [
        (f"n: {FUSED}", pytest.approx(1.5), "ms"),
        (f"n: {PYTORCH}", pytest.approx(4.0), "ms"),
        (f"n: {PASSES}", pytest.approx(1.0), "ms"),
        (f"n: {PYTORCH} / {FUSED}", 2.5, "times"),
        (f"n: {PASSES} / {FUSED}", 0.75, "times"),
    ]


def test_a_wrong_derivative_is_reported_and_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong:
        @staticmethod
        def batch_norm_jvp(*arguments: object) -> Dual:
            right: Dual = reference.batch_norm_jvp(*arguments)  # type: ignore[arg-type]
            return Dual(right.primal, 1.1 * right.tangent)

    def backend(x: Tensor) -> type[Wrong]:
        return Wrong

    monkeypatch.setattr(losses, "backend", backend)
    problem = Problem("wrn_10_1", models.build("wrn_10_1", 10), 32, 4, torch.device("cpu"))
    report = Report("x", argparse.Namespace(minutes=None, out=tmp_path / "out.json"))
    assert list(derivative.correct(problem, report)) == [PYTORCH, CENTRAL, PASSES]
    ((name, why),) = report.failed.items()
    assert name == f"wrn_10_1, 4 x 32 px: {FUSED}" and "AssertionError" in why


def test_smoke(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert derivative.main(["--smoke", "--device", "cpu", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    label = "wrn_10_1, 4 x 32 px"
    assert [row["name"] for row in found["rows"]] == [
        *(f"{label}: {name}" for name in (FUSED, PYTORCH, CENTRAL, PASSES)),
        *(f"{label}: {name} / {FUSED}" for name in (PYTORCH, CENTRAL, PASSES)),
    ]
