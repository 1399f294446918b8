"""The benchmark of the losses: counts, what is wrong, what is left out; no time is looked at."""

import json
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.tiny_run import ROOT
from tools.bench import count, losses, losses_variants
from tools.bench.losses import checked, rows
from tools.bench.losses_variants import (
    AUTOGRAD,
    COMPILED,
    EAGER,
    LIGER,
    LOSSES,
    ONE_PASS,
    OURS,
    PLAIN,
    WITHOUT_GRADIENT,
    Call,
    Inputs,
    Outputs,
    Shape,
    build,
    draw,
)
from tools.bench.results import Spread, spread

SMALL = Shape("teacher", 10, 16, torch.float32)
STUDENT, PSEUDO = SMALL._replace(loss="student"), SMALL._replace(loss="pseudo")
OTHER = SMALL._replace(batch=32)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@without_gpu
@pytest.mark.slow
def test_smoke_counts_launches_and_bytes(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    # A machine for GPU kernels may have no DALI.
    code = "import sys; sys.modules['nvidia.dali'] = None; from tools.bench import losses; "
    code += f"sys.exit(losses.main(['--smoke', '--out', {str(out)!r}]))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    smoke = json.loads(out.read_text())
    assert smoke["failed"] == {}
    assert smoke["skipped"] == [f"{name}: needs a GPU" for name in (*OURS, COMPILED, LIGER)]
    found = {row["name"]: row for row in smoke["rows"]}
    assert len(found) == 4 * 2 * 2 and {row["unit"] for row in smoke["rows"]} == {"launches", "MB"}
    # Read and written, bfloat16; pseudo and feedback have no gradient.
    numbers = (2 * (32 + 2 * 256), 2 * 256, 256, 2 * 32)
    for loss, least in zip(LOSSES, numbers, strict=True):
        row = found[f"{loss} C=1000 B=256 bfloat16, {PLAIN}, memory"]
        assert row["limit"] == least * 1000 * 2 / 1e6
    # What docs/losses.md publishes.
    names = [f"{s} C=1000 B=256 bfloat16, {v}" for s in LOSSES[:2] for v in (PLAIN, EAGER)]
    assert [found[f"{name}, launches"]["median"] for name in names] == [67, 104, 25, 30]
    times = [1 / found[f"{name}, memory"]["share_of_limit"] for name in names]
    assert [round(t) for t in times] == [23, 35, 14, 17]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "name", [PLAIN, EAGER, ONE_PASS, pytest.param(COMPILED, marks=pytest.mark.slow)]
)
def test_variants_compute_the_definition(
    name: str, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = partial(torch.compile, backend="eager")  # in one graph, without a compiler
    monkeypatch.setattr(torch, "compile", traced)
    shape = SMALL._replace(loss=loss)
    call = checked(name, shape, "cpu")  # ours by the reference, as always on a CPU
    assert (call(draw(shape, "cpu")).gradient is None) == (loss in WITHOUT_GRADIENT)


@pytest.mark.parametrize("name", [PLAIN, EAGER, ONE_PASS])
def test_feedback_is_of_two_labeled_losses(name: str) -> None:
    x = draw(SMALL._replace(loss="feedback"), "cpu")
    old, new = (F.cross_entropy(x.logits[half], x.target) for half in (slice(2), slice(2, 4)))
    assert old != new
    torch.testing.assert_close(build(name, "feedback")(x).out, (old, new, old - new))


@pytest.mark.parametrize(
    ("loss", "count"), [("teacher", 34), ("student", 16), ("pseudo", 16), ("feedback", 2 * 2)]
)
def test_inputs_have_the_shape_that_is_counted(loss: str, count: int) -> None:
    shape = SMALL._replace(loss=loss)
    x = draw(shape, "cpu")
    assert x.logits.shape == (shape.rows, 10) == (count, 10)
    assert shape.logit_bytes == count * 10 * 4
    assert int(x.target.max()) < 10


def broken(fault: str) -> Call:
    """Our definition with one thing wrong."""

    def call(x: Inputs) -> Outputs:
        out, gradient = build(EAGER, "teacher")(x)
        loss, *terms, label = out
        assert gradient is not None
        if fault == "gradient":
            gradient[3, 2] += 1e-3
        if fault == "unwritten":
            gradient[-1, -1] = torch.nan
        if fault == "statistic":
            terms[5] = terms[5] * (1 + 1e-4)
        if fault == "label":
            label = label.roll(1)
        return Outputs((loss.bfloat16() if fault == "rounded" else loss, *terms, label), gradient)

    return call


@pytest.mark.parametrize(
    ("name", "fault", "words"),
    [
        (COMPILED, "none", None),
        (COMPILED, "gradient", "the gradient: .* 1 / 340"),
        (COMPILED, "unwritten", "the gradient: .* 1 / 340"),
        (COMPILED, "statistic", r"item \[6\]"),
        (COMPILED, "label", r"item \[8\]"),
        (COMPILED, "rounded", r"item \[0\]"),
        (LIGER, "rounded", None),
        (LIGER, "label", r"item \[8\]"),
    ],
)
def test_what_is_wrong_is_found(
    name: str, fault: str, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_one(which: str, loss: str) -> Call:
        return broken(fault) if which == name else build(which, loss)

    monkeypatch.setattr(losses, "build", build_one)
    expected = pytest.raises(AssertionError, match=f"(?s){words}") if words else nullcontext()
    with expected:
        checked(name, SMALL._replace(dtype=torch.bfloat16), "cpu")


@pytest.mark.parametrize(("megabytes", "sets"), [(1, 200), (10, 22), (139, 3), (762, 3)])
def test_inputs_outgrow_the_cache_but_not_the_memory(megabytes: int, sets: int) -> None:
    assert losses.set_count(megabytes * 10**6, 50 * 2**20) == sets


def test_inputs_and_gradients_take_turns() -> None:
    seen, kept = list[int](), list[torch.Tensor]()

    def call(x: Inputs) -> Outputs:
        seen.append(x.logits.data_ptr())
        kept.append(torch.ones(3))
        return Outputs((), kept[-1])

    work = losses.rotating(call, [draw(SMALL, "cpu") for _ in range(2)])
    for _ in range(4):
        work()
    assert seen[:2] == seen[2:] and seen[0] != seen[1]
    references = [sys.getrefcount(gradient) for gradient in kept]
    assert references[0] == references[1] == references[2] - 1 == references[3] - 1


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


@without_gpu
def test_one_line_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert losses.main(["--out", str(tmp_path / "out.json")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "--smoke" in printed.err
    assert not list(tmp_path.iterdir())


def uncompiled(name: str, loss: str) -> Call:
    """In the place of torch.compile our definition, and of Liger one that does what Liger does."""
    if name != LIGER:
        return build(EAGER if name == COMPILED else name, loss)

    def overwriting(x: Inputs) -> Outputs:
        (value,), gradient = build(EAGER, loss)(x)
        assert gradient is not None and bool(value.isfinite())  # waits for the device
        x.logits.data.copy_(gradient)
        return Outputs((value,), gradient)

    return overwriting


@pytest.fixture
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """Lets the command run as on a GPU, on small shapes, with clocks that return constants.

    Returns the shapes that inputs are drawn for.
    """
    drawn = list[Shape]()

    def input_sets(shape: Shape) -> list[Inputs]:
        drawn.append(shape)
        return [draw(shape, "cpu") for _ in range(2)]

    small = [SMALL._replace(loss=loss) for loss in LOSSES] + [OTHER]
    for name, value in {
        "GPU": "cpu",
        "SHAPES": small,
        "build": uncompiled,
        "input_sets": input_sets,
        "HOST_CALLS": 1,
    }.items():
        monkeypatch.setattr(losses, name, value)
    monkeypatch.setattr(losses_variants, "find_spec", lambda name: name)  # Liger is installed
    monkeypatch.setattr("mpl_fast.losses.use", lambda choice: nullcontext())
    monkeypatch.setattr(count, "launches", lambda work: 2)
    monkeypatch.setattr(count, "extra_memory", lambda work: 1000)
    for name in ("is_available", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    monkeypatch.setattr("tools.bench.harness.describe", lambda commit: {"commit": commit})
    limits = SimpleNamespace(best=lambda name: 1e9, rows=list)
    monkeypatch.setattr("tools.bench.harness.Report.limits", limits)
    clock_of(monkeypatch, lambda work, return_mode: [work(), [0.01] * 10][1])
    return drawn


def clock_of(monkeypatch: pytest.MonkeyPatch, do_bench: Any) -> None:
    module = SimpleNamespace(do_bench_cudagraph=do_bench)
    monkeypatch.setitem(sys.modules, "triton.testing", module)


def run(out: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    assert losses.main(["--out", str(out), *arguments]) == code
    found: dict[str, Any] = json.loads(out.read_text())
    found["rows"] = {row["name"]: row for row in found["rows"]}
    return found


def timed(found: dict[str, Any]) -> list[str]:
    times = [name for name, row in found["rows"].items() if row["unit"] == "us"]
    return [name for name in times if not name.endswith(", host")]


def test_a_whole_run(simulated_gpu: list[Shape], tmp_path: Path) -> None:
    found = run(tmp_path / "out.json")
    ours = found["rows"][f"{SMALL}, {ONE_PASS}"]
    assert (ours["median"], ours["n"]) == (10.0, 3 * 10)
    assert found["rows"][f"{SMALL}, {ONE_PASS}, host"]["n"] == 3
    assert found["rows"][f"{SMALL}, {COMPILED} / {ONE_PASS}"]["median"] == 1.0
    assert found["rows"][f"{SMALL}, {ONE_PASS}, launches"]["median"] == 2
    assert found["rows"][f"{STUDENT}, {AUTOGRAD}, extra memory"]["median"] == 1e-3
    assert len(timed(found)) == 5 * 4 + 1  # the student's by autograd too
    assert len(simulated_gpu) == 5 * 4 + 2  # inputs of its own for each: Liger overwrites them
    # What waits for the device cannot be captured, and is timed on the host alone.
    (skipped,) = found["skipped"]
    assert skipped.startswith(f"no CUDA graph: {STUDENT}, {LIGER}: it waits in _local_scalar")
    assert f"{STUDENT}, {LIGER}, host" in found["rows"]
    found = run(tmp_path / "b.json", "--minutes", "0")
    assert not found["rows"] and found["skipped"][4] == f"no time: {OTHER}"


@pytest.mark.usefixtures("simulated_gpu")
def test_a_variant_that_fails_or_is_wrong_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_some(name: str, loss: str) -> Call:
        if (name, loss) == (COMPILED, "pseudo"):
            raise RuntimeError("no\ncompiler")
        return broken("gradient") if (name, loss) == (PLAIN, "teacher") else uncompiled(name, loss)

    monkeypatch.setattr(losses, "build", build_some)
    found = run(tmp_path / "out.json", code=1)
    wrong = [f"{SMALL}, {PLAIN}", f"{PSEUDO}, {COMPILED}", f"{OTHER}, {PLAIN}"]
    assert list(found["failed"]) == wrong
    assert "the gradient" in found["failed"][wrong[0]]
    assert found["failed"][wrong[1]] == "RuntimeError: no compiler"
    assert len(timed(found)) == 5 * 4 + 1 - 3 and not {*wrong} & {*timed(found)}


@pytest.mark.usefixtures("simulated_gpu")
def test_after_a_failed_capture_the_rows_so_far_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = iter(range(3 * 4))  # one shape's

    def lost(work: Any, return_mode: str) -> list[float]:
        if next(turns, None) is None:
            raise RuntimeError("operation failed due to a previous error during capture")
        return [0.01]

    clock_of(monkeypatch, lost)
    found = run(tmp_path / "out.json", code=3)
    assert list(found["failed"]) == ["the GPU"]
    assert "no CUDA graph could be captured: RuntimeError" in found["failed"]["the GPU"]
    assert len(timed(found)) == 4
