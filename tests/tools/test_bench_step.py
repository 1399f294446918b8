"""The benchmark of the step compares like with like and reports right; no time is looked at."""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.bench import step, step_checks, step_reference, step_variants
from tools.bench.harness import Report
from tools.bench.step import Found, Scene, rows
from tools.bench.step_phases import PHASES, REMAINDER, phases
from tools.bench.step_reference import PlainStep
from tools.bench.step_variants import PLAIN, PLAIN_AMP, Flavor, Setting, Variant, batch

CPU = torch.device("cpu")
TINY = Setting("wrn_10_1", 3, 2, 8, CPU)


@pytest.mark.slow
def test_smoke_times_every_variant_and_claims_nothing(tmp_path: Path) -> None:
    """Of those that compile nothing."""
    out, only = tmp_path / "out.json", ["plain", "fp32 eager"]
    assert step.main(["--smoke", "--device", "cpu", "--out", str(out), "--only", *only]) == 0
    smoke = json.loads(out.read_text())
    found = {row["name"]: row for row in smoke["rows"]}
    assert smoke["claim"].startswith("a smoke test")
    for name in ("plain fp32", "plain amp", "ours fp32 eager joint", "one pass fp32 eager"):
        assert found[f"mpl, {name}: step"]["median"] > 0.0
    assert "mpl, plain fp32 / ours fp32 eager joint" in found
    assert "mpl, ours fp32 eager joint: step / its 46 passes" in found  # 2 (5 + 9 * 2)
    assert not any(row["steady"] or row["target"] is not None for row in smoke["rows"])
    phase = "mpl, plain fp32, phase: "
    of_plain = {PHASES[name] for name in vars(PlainStep) if name in PHASES}
    assert len(of_plain) == 8
    assert {n.removeprefix(phase) for n in found if n.startswith(phase)} == {*of_plain, REMAINDER}
    assert (smoke["skipped"], smoke["failed"]) == ([], {})
    assert smoke["best of ours"] == "ours fp32 eager joint"
    (checked,) = smoke["correctness"]
    assert "our parity step and the plain step in float64" in checked["what"]
    assert checked["error"] < 1e-9  # what is allowed is 1e-6


def test_what_was_built_is_saved_if_another_takes_too_long(tmp_path: Path) -> None:
    def too_long() -> Variant:
        raise KeyboardInterrupt

    out = tmp_path / "out.json"
    given = argparse.Namespace(minutes=None, out=out, commit=None, smoke=True)
    variants = {"plain": lambda: step_variants.plain(TINY, amp=False), "slow": too_long}
    with pytest.raises(KeyboardInterrupt):
        step._built(variants, math.inf, Report("step", given))
    (name,), (seconds,) = zip(*json.loads(out.read_text())[step.ONCE].items(), strict=True)
    assert name == "plain" and seconds > 0.0


@pytest.mark.parametrize("factor", [1.001, math.nan])
def test_another_step_is_found_out(
    factor: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def other(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        return loss if loss.isnan() else factor * loss

    monkeypatch.setattr(step_reference, "_smoothed", other)
    check = step_checks.parity(TINY)
    assert check.wrong
    report = Report("step", argparse.Namespace(minutes=None, out=tmp_path / "out.json"))
    report.more["correctness"] = []
    step._note(report, [check, check._replace(what="right", error=0.0)])
    assert list(report.failed) == [check.what]


@pytest.mark.parametrize(("labeled", "mu", "passes"), [(4, 7, 4 * 68.0), (2, 2, 46.0)])
def test_passes_are_those_of_a_real_step(labeled: int, mu: int, passes: float) -> None:
    """5 + 9 mu of each labeled image: those of the design, and two passes on labeled ones."""
    assert step.passes(TINY._replace(labeled=labeled, mu=mu)) == passes


def test_the_images_lie_as_a_loader_gives_them() -> None:
    made = batch(TINY, "mpl", torch.bfloat16)
    assert made.labeled.shape == (3, 3, 8, 8)
    assert made.weak.shape == made.strong.shape == (6, 3, 8, 8)
    assert made.weak.dtype == torch.bfloat16
    assert made.strong.is_contiguous(memory_format=torch.channels_last)
    one_piece = {view.untyped_storage().data_ptr() for view in (made.labeled, made.weak)}
    assert len(one_piece) == 1
    assert len(batch(TINY, "supervised").labels) == TINY.distinct == 9


def test_phases_add_up_and_name_the_learner() -> None:
    one = step_variants.ours(TINY, "mpl", Flavor())
    one.step()
    began = time.perf_counter()
    parts = phases(one.step, one.owners)
    whole = time.perf_counter() - began
    names = {"teacher forward", "student labeled loss", "student forward", "ends", REMAINDER}
    assert names <= set(parts)
    assert any(name.startswith("teacher backward") for name in parts)
    assert any(name.startswith("student") and "update" in name for name in parts)
    assert all(seconds >= 0.0 for seconds in parts.values())
    assert 0.0 < sum(parts.values()) <= whole
    assert type(next(iter(one.owners.values()))).__call__.__name__ == "__call__"  # unwrapped again


def test_a_wrong_compiled_network_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiling: the flavor says compiled, and the learner's logits are others."""
    one = step_variants.ours(TINY, "mpl", Flavor())
    one = one._replace(flavor=Flavor(compiled="default"))
    one.step()
    checks = step_checks.compiled_logits(one, TINY)
    assert [check.wrong for check in checks] == [False, False]
    learner: Any = one.owners["teacher"]
    forward = learner.forward_batch_stats
    monkeypatch.setattr(learner, "forward_batch_stats", lambda x: forward(x) * 1.01)
    checks = step_checks.compiled_logits(one, TINY)
    assert [check.wrong for check in checks] == [True, False]


SECONDS = {
    "plain fp32": [3.0, 6.0],
    "plain amp": [4.0, 4.0],
    "ours bf16 compiled joint": [1.5, 2.0],
    "ours bf16 compiled split": [1.0, 1.0],
    "ours fp32 compiled split": [2.0, 3.0],
    "one pass bf16 compiled": [0.3, 0.5],
}
WRN = Setting("wrn_28_2", 8, 7, 32, CPU)
H100 = "NVIDIA H100 80GB HBM3"


def by_name(scene: Scene) -> dict[str, Any]:
    return {row.name.removeprefix("mpl, "): row for row in rows(Found(SECONDS, {}, {}), scene)}


def test_rows_of_known_times() -> None:
    made = by_name(Scene(WRN, "", False))
    for name, values in {
        "plain fp32 / best of ours": (4.5, 3.0, 6.0),  # round by round
        "plain fp32 / best of ours in fp32": (1.75, 1.5, 2.0),
        "ours bf16 compiled joint / split": (1.75, 1.5, 2.0),
        "plain fp32: distinct images": (16.0, 64 / 6.0, 64 / 3.0),
        # 64 images took 0.3 and 0.5 s with three passes each; the step makes 544.
        "ours bf16 compiled joint: step / its 544 passes": (27 / 17, 24 / 17, 30 / 17),
    }.items():
        assert made[name].found[:3] == pytest.approx(values)
    assert all(row.steady == (row.unit == "x") for row in made.values())


AIMS = {
    (WRN, ""): {"plain fp32 / best of ours": 2.5, "plain fp32 / best of ours in fp32": 1.3},
    (WRN._replace(model="resnet50"), ""): {},
    (WRN, "A10"): {},
    (WRN._replace(labeled=64), H100): {
        "plain amp / best of ours": 4.0,
        "ours bf16 compiled split: step": 15.0,
    },
    (Setting("resnet50", 32, 7, 224, CPU), H100): {
        "plain amp / best of ours": 2.5,
        "ours bf16 compiled split: distinct images": 1000.0,
    },
}


@pytest.mark.parametrize(("setting", "gpu"), AIMS)
def test_targets(setting: Setting, gpu: str) -> None:
    aims = AIMS[setting, gpu]
    if gpu == H100:
        share = f"ours bf16 compiled joint: step / its {setting.labeled * 68} passes"
        aims = aims | {share: 1.05, "ours bf16 compiled joint / split": 1.25}
    made = by_name(Scene(setting, gpu, False))
    assert {name: row.target for name, row in made.items() if row.target is not None} == aims
    smoke = by_name(Scene(setting, gpu, True)).values()
    assert not any(row.steady or row.target for row in smoke)


def test_what_fails_or_has_no_time_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Variant:
        raise RuntimeError("no compiler\nand a long text")

    def one(name: str) -> Callable[[], Variant]:
        return lambda: Variant(name, dict, {"": object()})

    builders = {"ours fp32 eager joint": broken, PLAIN: one(PLAIN), PLAIN_AMP: one(PLAIN_AMP)}
    monkeypatch.setattr(step, "builders", lambda setting: builders)
    parity = step_checks.Check("parity", 0.0, 1.0)
    monkeypatch.setattr(step_checks, "parity", lambda setting: parity)
    for given, names in (([], [PLAIN, PLAIN_AMP]), (["--minutes", "0"], [PLAIN])):
        out = tmp_path / "out.json"
        arguments = ["--smoke", "--only", "", "--device", "cpu", "--out", str(out), *given]
        assert step.main(arguments) == 1
        found = json.loads(out.read_text())
        times = [(row["name"], row["n"]) for row in found["rows"] if row["name"].endswith(": step")]
        assert times == [(f"mpl, {name}: step", 1) for name in names]
        failed = {"ours fp32 eager joint": "RuntimeError: no compiler and a long text"}
        assert found["failed"] == failed
        assert found["skipped"] == ([f"no time: {PLAIN_AMP}", "no time: phases"] if given else [])


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--model", "wrn_28_3"], "wrn_28_3"), (["--smoke", "--only", "nothing"], "--only nothing")],
)
def test_one_line_for_a_wrong_option(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert step.main(["--device", "cpu", "--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error
    assert not list(tmp_path.iterdir())
