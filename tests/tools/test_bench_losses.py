"""The benchmark of the losses: counts, what is wrong, what is left out; no time is looked at."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_run import ROOT
from tools.bench import count, harness, losses, losses_variants
from tools.bench.harness import Report
from tools.bench.losses import compare, rows
from tools.bench.losses_variants import (
    COMPILED,
    EAGER,
    LIGER,
    LOSSES,
    ONE_PASS,
    PLAIN,
    WITHOUT_GRADIENT,
    Call,
    Inputs,
    Outputs,
    Shape,
    definition,
    draw,
)
from tools.bench.results import Spread, spread

SMALL = Shape("teacher", 10, 16, torch.float32)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of --smoke, in a process of its own: kernels are decorated for the interpreter."""
    out = tmp_path_factory.mktemp("bench") / "out.json"
    command = [sys.executable, "-m", "tools.bench", "losses", "--smoke", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_smoke_counts_launches_and_bytes(smoke: dict[str, Any]) -> None:
    found = {row["name"]: row for row in smoke["rows"]}

    def launched(loss: str, variant: str) -> float:
        return float(found[f"{loss} C=1000 B=256 bfloat16, {variant}, launches"]["median"])

    def moved(loss: str, variant: str) -> dict[str, Any]:
        row: dict[str, Any] = found[f"{loss} C=1000 B=256 bfloat16, {variant}, memory"]
        return row

    # Read and written, bfloat16; pseudo and feedback have no gradient.
    assert moved("teacher", PLAIN)["limit"] == 2 * (32 + 2 * 256) * 1000 * 2 / 1e6
    assert moved("student", PLAIN)["limit"] == 2 * 256 * 1000 * 2 / 1e6
    assert moved("pseudo", PLAIN)["limit"] == 256 * 1000 * 2 / 1e6
    assert moved("feedback", PLAIN)["limit"] == 2 * 32 * 1000 * 2 / 1e6
    # What docs/losses.md publishes.
    counts = [launched(loss, v) for loss in LOSSES[:2] for v in (PLAIN, EAGER)]
    assert counts == [67, 104, 25, 30]
    times = [1 / moved(loss, v)["share_of_limit"] for loss in LOSSES[:2] for v in (PLAIN, EAGER)]
    assert [round(t) for t in times] == [23, 35, 14, 17]
    assert not any(row["unit"] == "us" for row in smoke["rows"])
    assert {f"{name}: needs a GPU" for name in (COMPILED, LIGER)} <= {*smoke["skipped"]}
    correct = smoke["correctness"]
    assert len(correct) == 2 * 4 * 2 + 4 + 1  # shapes, losses, variants; ours, and by autograd
    assert all(one["wrong"] == "" and one["statistics"] < 2e-6 for one in correct)
    assert sum(one["gradient"] > 0.0 for one in correct) == 2 * 2 * 2 + 2 + 1
    assert smoke["failed"] == {}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_smoke_runs_our_kernels_on_the_interpreter(smoke: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    kernels = {name.removeprefix("C=100 "): found for name, found in smoke["kernels"].items()}
    launched = {row["name"]: row["median"] for row in smoke["rows"] if "C=100 B=16" in row["name"]}
    names = [f"{loss} C=100 B=16 float32, {ONE_PASS}" for loss in LOSSES]
    # By the design: a kernel and a sum; one kernel that labels.
    assert kernels[names[0]] == ["teacher_kernel"]
    assert [launched[f"{name}, launches"] for name in names[:3]] == [2, 2, 1]
    assert len(kernels[names[3]]) == 2  # the labeled loss before and after
    autograd = "student C=100 B=16 float32, ours autograd"
    assert len(kernels[autograd]) == 2  # forward and backward


def broken(fault: str) -> Call:
    """Our definition with one thing wrong."""
    sound = definition(SMALL)

    def call(x: Inputs) -> Outputs:
        out, gradient = sound(x)
        assert gradient is not None
        if fault == "gradient":
            gradient[3, 2] += 1e-3
        if fault == "unwritten":
            gradient[-1, -1] = torch.nan
        if fault == "statistic":
            out = out._replace(entropy=out.entropy * (1 + 1e-4))
        if fault == "label":
            out = out._replace(label=out.label.roll(1))
        if fault == "raises":
            raise RuntimeError("no such kernel")
        return Outputs(out, gradient)

    return call


FAULTS = [("none", ""), ("gradient", "the gradient is off"), ("unwritten", "the gradient is off")]
FAULTS += [("statistic", "entropy is off"), ("label", "label differs")]
FAULTS += [("raises", "no such kernel")]


@pytest.mark.parametrize(("fault", "words"), FAULTS)
def test_what_is_wrong_is_reported(
    fault: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(losses, "build", lambda name, shape: broken(fault))
    monkeypatch.setattr(losses, "LOSSES", ["teacher"])
    monkeypatch.setattr(losses, "CHECKED_BATCH", SMALL.batch)
    report = report_of(tmp_path)
    faulty = losses.check([(SMALL.classes, SMALL.dtype)], [EAGER], "cpu", report)
    (checked,) = report.more["correctness"]
    assert words in checked["wrong"]
    assert (checked["statistics"] == "nan") == (fault == "raises")  # NaN is not JSON
    assert faulty == (set() if fault == "none" else {(EAGER, "teacher")})
    assert list(report.failed) == ([] if fault == "none" else [f"{SMALL}, {EAGER}"])


def report_of(folder: Path) -> Report:
    report = Report("losses", parsed("--commit", "abc", "--out", str(folder / "out.json")))
    report.more["correctness"] = []
    return report


def parsed(*given: str) -> Any:
    return harness.parse("losses", "Doc.", given, losses.options, 30)


def test_plain_pytorch_computes_the_definition() -> None:
    for loss in LOSSES:
        one = losses.case_of(SMALL._replace(loss=loss), "cpu")
        for name in (PLAIN, EAGER):
            assert compare(one, losses_variants.build(name, one.shape), "cpu").wrong == ""
        assert (one.expected.gradient is None) == (loss in WITHOUT_GRADIENT)


@pytest.mark.parametrize(("megabytes", "sets"), [(1, 200), (10, 22), (139, 3), (762, 3)])
def test_inputs_outgrow_the_cache_but_not_the_memory(megabytes: int, sets: int) -> None:
    assert losses.set_count(megabytes * 10**6, 50 * 2**20) == sets


def test_ratios_are_to_torch_compile_and_to_plain_eager() -> None:
    device = {COMPILED: [4.0, 6.0], ONE_PASS: [2.0, 2.0], PLAIN: [8.0, 8.0]}
    made = {row.name: row for row in rows(SMALL, device, {LIGER: [9.0]}, copy=1e9)}
    ours = made[f"{SMALL}, {ONE_PASS}"]
    assert ours.found == Spread(2.0, 2.0, 2.0, 2)
    assert ours.limit == pytest.approx(1e6 * SMALL.minimal_bytes / 1e9)
    assert made[f"{SMALL}, {COMPILED} / {ONE_PASS}"].found == Spread(2.5, 2.0, 3.0, 2)
    assert made[f"{SMALL}, {PLAIN} / {ONE_PASS}"].found.median == 4.0
    assert f"{SMALL}, {PLAIN} / {PLAIN}" not in made
    assert made[f"{SMALL}, {LIGER}, host"].found == spread([9.0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_line_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert losses.main(["--out", str(tmp_path / "out.json")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "--smoke" in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_needs_no_dali() -> None:
    """A machine for GPU kernels may have none."""
    code = "import sys; sys.modules['nvidia.dali'] = None; import tools.bench.losses"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def uncompiled(name: str, shape: Shape) -> Call:
    """Our definition in the place of all variants that need a GPU or a compiler."""
    return losses_variants.build(name if name == PLAIN else EAGER, shape)


class SimulatedGraph:
    """Replays nothing."""


@pytest.fixture
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the command run as on a GPU, on small shapes, with clocks that return constants."""

    def captured(work: Any) -> SimulatedGraph:
        work()
        return SimulatedGraph()

    small = [SMALL._replace(loss=loss) for loss in LOSSES] + [SMALL._replace(batch=32)]
    for name, value in {
        "GPU": "cpu",
        "CHECKED": [(10, torch.float32)],
        "SHAPES": small,
        "build": uncompiled,
        "require_device": lambda: None,
        "synchronization": lambda work: "",
        "captured": captured,
        "input_sets": lambda shape: [draw(shape, "cpu") for _ in range(2)],
        "_warm_up": lambda call, sets: call(sets[1]),
        "_replay_us": lambda graph: 20.0,
        "_host_us": lambda ready: 50.0,
    }.items():
        monkeypatch.setattr(losses, name, value)
    monkeypatch.setattr(count, "launches", lambda work: 2)
    monkeypatch.setattr(count, "extra_memory", lambda work: 1000)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def run(folder: Path, *arguments: str, expect: int = 0) -> dict[str, Any]:
    """The result of `_on_gpu`."""
    options = parsed("--commit", "abc", "--out", str(folder / "out.json"), *arguments)
    report = Report("losses", options)
    report.more["correctness"] = []
    losses._on_gpu(options, report)
    assert bool(report.failed) == bool(expect)
    return report.result()


def names_of(result: dict[str, Any], unit: str = "us") -> list[str]:
    found = [row["name"] for row in result["rows"] if row["unit"] == unit]
    return [name for name in found if not name.endswith(", host")]


@pytest.mark.slow
def test_a_whole_run(simulated_gpu: None, tmp_path: Path) -> None:
    result = run(tmp_path, "--rounds", "3")
    found = {row["name"]: row for row in result["rows"]}
    ours = found[f"{SMALL}, {ONE_PASS}"]
    assert (ours["median"], ours["n"]) == (10.0, 3)  # a replay is of two sets
    assert found[f"{SMALL}, {ONE_PASS}, host"]["median"] == 50.0
    assert found[f"{SMALL}, {COMPILED} / {ONE_PASS}"]["median"] == 1.0
    assert found[f"{SMALL}, {ONE_PASS}, launches"]["median"] == 2
    assert len(names_of(result)) == 4 * 4 + 1 + 4  # the student's by autograd too
    assert result["limits"]["copy, bytes/s"]["high"] > 0
    assert result["skipped"] == []


@pytest.mark.slow
def test_what_cannot_be_captured_or_fails_is_left_out(
    simulated_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_some(name: str, shape: Shape) -> Call:
        if name == COMPILED and shape.loss == "pseudo":
            raise RuntimeError("no\ncompiler")
        return uncompiled(name, shape)

    monkeypatch.setattr(losses, "build", build_some)
    monkeypatch.setattr(losses, "synchronization", lambda work: "it synchronizes")
    result = run(tmp_path)
    pseudo = SMALL._replace(loss="pseudo")
    assert f"failed: {pseudo}, {COMPILED}: RuntimeError: no compiler" in result["skipped"]
    assert f"no CUDA graph: {SMALL}, {ONE_PASS}: it synchronizes" in result["skipped"]
    assert names_of(result) == []
    assert f"{SMALL}, {ONE_PASS}, host" in [row["name"] for row in result["rows"]]


@pytest.mark.slow
def test_a_wrong_variant_is_not_timed(
    simulated_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = broken("gradient")

    def build(name: str, shape: Shape) -> Call:
        return wrong if (name, shape) == (COMPILED, SMALL) else uncompiled(name, shape)

    monkeypatch.setattr(losses, "build", build)
    result = run(tmp_path, expect=1)
    assert list(result["failed"]) == [f"{SMALL}, {COMPILED}"]
    assert "the gradient is off" in result["failed"][f"{SMALL}, {COMPILED}"]
    timed = names_of(result)
    assert f"{SMALL}, {COMPILED}" not in timed
    assert {f"{SMALL}, {PLAIN}", f"{SMALL._replace(batch=32)}, {COMPILED}"} <= {*timed}
    result = run(
        tmp_path, "--minutes", "0", expect=0
    )  # of what there is no time for, nothing is timed
    assert names_of(result) == [] and f"no time: {SMALL}" in result["skipped"]
