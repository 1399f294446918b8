"""The kernels' machine code, compiled for GPUs that are not here; and the command that reports it.

The interpreter accepts code that the compiler refuses, so both are tested.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import JITFunction, driver

from mpl_fast.kernels import aot, fused, machine_code
from mpl_fast.kernels.outputs import Dual
from mpl_fast.kernels.variants import VARIANTS

compiles = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)
# One small block; ImageNet; the widest row in registers; ImageNet-21k, padded to 8 and not.
ROWS = [
    (10, "float32"),
    (1000, "bfloat16"),
    (8192, "float32"),
    (21848, "bfloat16"),
    (21841, "float16"),
]


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_every_variant_compiles_without_a_fault(arch: int) -> None:
    """Each variant for one kind of rows, for another one on each architecture."""
    turn = aot.ARCHITECTURES.index(arch)
    jobs = [
        aot.Job(arch, variant, *ROWS[(place + 2 * turn) % len(ROWS)])
        for place, variant in enumerate(VARIANTS)
    ]
    kernels, failures = aot.compile_all(jobs, 1, lambda line: None)
    assert failures == []
    assert [fault for kernel in kernels for fault in aot.faults(kernel)] == []
    assert 0 < max(kernel.registers for kernel in kernels) <= 180
    # The widths that are found are those of single elements where rows have an odd pitch.
    for kernel in kernels:
        # Of float32 where a kernel reads sums.
        item = 4 if kernel.kernel == "join_kernel" else getattr(torch, kernel.job.dtype).itemsize
        narrow = kernel.job.classes == 21841
        assert min(kernel.loads) == item if narrow else max(kernel.loads) <= 32


@compiles
@pytest.mark.parametrize(
    ("variant", "classes", "dtype"),
    [
        ("teacher_loss_and_grad strong", 21848, "float32"),
        ("teacher_loss_and_grad given", 21841, "float32"),
        ("student_loss_and_grad soft", 21848, "bfloat16"),
        ("student_loss_and_grad soft", 21848, "float16"),
    ],
)
def test_no_number_is_held_through_a_loop_that_fills_all_registers(
    variant: str, classes: int, dtype: str
) -> None:
    """These spilled one for being computed before the loop over the row and not after it."""
    found = aot.compile_job(aot.Job(90, variant, classes, dtype))
    assert isinstance(found, list), found
    assert {(kernel.stack, kernel.local) for kernel in found} == {(0, 0)}


@compiles
@pytest.mark.parametrize(
    ("variant", "rows"),
    [
        ("teacher_loss_and_grad strong", 3),  # a labeled row; a weak and a strong one
        ("student_loss_and_grad hard", 1),
        ("student_loss_and_grad soft", 2),
        ("pseudo_labels sampled", 1),
    ],
)
def test_a_row_that_is_one_block_is_read_once(variant: str, rows: int) -> None:
    """A store between its sums and its gradient would make the compiler read it again."""
    found = aot.compile_job(aot.Job(90, variant, 1000, "bfloat16"))
    assert isinstance(found, list), found
    (kernel,) = found
    assert {width: 32 * count for width, count in kernel.loads.items()} == {16: rows * 1024 // 8}


@compiles
@pytest.mark.parametrize(("rows", "channels"), [(16 * 512, 64), (40_000, 4), (9_000, 256)])
def test_moments_of_many_parts_are_joined_in_registers(rows: int, channels: int) -> None:
    x, channel = (Dual(x, x) for x in (torch.zeros(rows, channels), torch.zeros(channels)))
    with aot.recording(90) as launches:
        fused.batch_norm_jvp(x, channel, channel, None, 1e-5, 0.0)
    codes = {name: machine_code.read(kernel) for name, kernel, _ in launches}
    assert codes.keys() == {"moments_kernel", "join_kernel", "normalize_kernel"}
    for code in codes.values():
        assert code.stack == code.local == 0 and not code.narrow


@triton.jit  # type: ignore[untyped-decorator]
def greedy(x_ptr: tl.tensor, y_ptr: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Holds a row that does not fit into a warp's registers."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x / tl.sum(x, 0))


@compiles
@pytest.mark.slow
def test_a_spill_is_detected() -> None:
    with aot.recording(90) as launches:
        greedy[(1,)](
            torch.zeros(8192), torch.zeros(8192), BLOCK=8192, num_warps=1, enable_fp_fusion=True
        )
    ((name, kernel, _),) = launches
    code = machine_code.read(kernel)
    assert name == "greedy"
    assert code.stack > 0
    assert code.loads == code.stores == {16: 8192 * 4 // 16 // 32} and not code.narrow


@triton.jit  # type: ignore[untyped-decorator]
def copy(x_ptr: tl.tensor, y_ptr: tl.tensor, stride: int, BLOCK: tl.constexpr) -> None:
    """Reads every `stride`-th number of a row."""
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs * stride))


@compiles
@pytest.mark.parametrize(("block", "stride", "narrow"), [(256, 2, ("loads",)), (32, 2, ())])
def test_an_access_is_narrow_if_the_block_allows_a_wider_one(
    block: int, stride: int, narrow: tuple[str, ...]
) -> None:
    """Of one float32 for each thread, as of a few channels, there is none."""
    with aot.recording(90) as launches:
        copy[(1,)](
            torch.zeros(512),
            torch.zeros(512),
            stride,
            BLOCK=block,
            num_warps=1,
            enable_fp_fusion=True,
        )
    code = machine_code.read(launches[0][1])
    assert min(code.loads) == 4 and code.narrow == narrow


@compiles
def test_a_recording_restores_everything() -> None:
    def state() -> tuple[object, ...]:
        return JITFunction.run, driver._active, os.environ.get("TRITON_CACHE_DIR")

    before = state()
    with pytest.raises(ZeroDivisionError), aot.recording(90):
        assert not set(before) & {*state()} - {None}
        raise ZeroDivisionError
    assert state() == before


SOUND = aot.Compiled(
    kernel="teacher_kernel",
    job=aot.Job(90, "teacher_loss_and_grad weak", 1000, "bfloat16"),
    digest="made up",
    warps=1,
    registers=128,
    stack=0,
    local=0,
    shared=64,
    loads={16: 8},
    stores={16: 8},
    narrow=(),
    seconds=0.5,
)
FAULTY = {
    "stack": (SOUND._replace(stack=56), "spills 56 bytes of stack"),
    "local": (SOUND._replace(local=8), "8 of local memory"),
    "read": (
        SOUND._replace(loads={2: 32, 16: 8}, narrow=("loads",)),
        "reads rows of 2000 bytes 2 bytes at a time",
    ),
    "write": (
        SOUND._replace(stores={8: 16}, narrow=("stores",)),
        "writes rows of 2000 bytes 8 bytes at a time",
    ),
    "blind": (SOUND._replace(loads={}), "no load of a row"),
}


def made_up(
    monkeypatch: pytest.MonkeyPatch, kernels: Sequence[aot.Compiled], failures: Sequence[str] = ()
) -> None:
    """Replaces what the command compiles."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(aot, "compile_all", lambda *_: (list(kernels), list(failures)))


@pytest.mark.parametrize("name", FAULTY)
def test_exit_code_1_on_a_fault(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    kernel, text = FAULTY[name]
    made_up(monkeypatch, [SOUND, kernel])
    assert aot.main(["--json", str(tmp_path / "report.json")]) == 1
    printed = capsys.readouterr().out
    assert "2 kernels, 1 faults" in printed
    assert text in printed
    (fault,) = json.loads((tmp_path / "report.json").read_text())["faults"]
    assert text in fault


def test_exit_code_0_without_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Rows of an odd pitch cannot be read any wider: that is no fault."""
    odd = aot.Job(90, "teacher_loss_and_grad weak", 21841, "bfloat16")
    made_up(monkeypatch, [SOUND, SOUND._replace(job=odd, loads={2: 32}, narrow=("loads",))])
    assert aot.main(["--json", str(tmp_path / "report.json")]) == 0
    assert "2 kernels, 0 faults" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["registers"] for row in report["kernels"]] == [128, 128]
    assert report["kernels"][0]["job"]["dtype"] == "bfloat16"
    assert report["versions"]["triton"] == triton.__version__


def test_exit_code_1_where_something_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(rows: object) -> None:
        raise ValueError("type mismatch\nin line 7")

    def idle(rows: object) -> None:
        pass

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(VARIANTS, "broken", broken)
    monkeypatch.setitem(VARIANTS, "idle", idle)
    monkeypatch.setattr(aot, "CLASSES", [10])
    arguments = ["--arch", "90", "--only", "broken", "idle", "--processes", "1"]
    assert aot.main(arguments) == 1
    printed = capsys.readouterr()
    assert "sm_90 broken, 10 classes, float32: ValueError: type mismatch in line 7" in printed.out
    assert "sm_90 idle, 10 classes, bfloat16: launches no kernel" in printed.out
    assert "0 kernels, 6 faults" in printed.out
    assert "6/6" in printed.err


@pytest.mark.parametrize("missing", ["compiler", "triton"])
def test_refuses_in_one_line(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1" if missing == "compiler" else "0")
    if missing == "triton":
        monkeypatch.setattr(aot, "find_spec", lambda name: None)
    assert aot.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert ("TRITON_INTERPRET" if missing == "compiler" else "not installed") in printed.err
