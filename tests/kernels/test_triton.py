"""The Triton kernel without a GPU: its values on the interpreter, its machine code by compiling."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from mpl_fast import losses
from mpl_fast.kernels import fused, teacher

HERE = Path(__file__).parent
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def test_values_on_the_interpreter() -> None:
    """In a process of its own: Triton decides when a kernel is decorated."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(HERE / "in_interpreter.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout[-5000:] + out.stderr[-2000:]
    assert " passed" in out.stdout


class PretendDriver:
    """Says that a GPU of some architecture is here, so that Triton compiles for it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> str:
        return f"sm_{self.capability}"  # not a number, so never mistaken for a real device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class Recorder:
    """Stands in for a kernel: compiles what a launch would compile, and launches nothing."""

    def __init__(self, kernel: object) -> None:
        self.kernel = kernel
        self.compiled: list[object] = []

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        def launch(*arguments: object, **options: object) -> None:
            warmup = self.kernel.warmup  # type: ignore[attr-defined]
            self.compiled.append(warmup(*arguments, grid=grid, **options))

        return launch


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Recorder]:
    """Makes Triton compile for a compute capability from here to the end of the test."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")

    def start(capability: int) -> Recorder:
        recorder = Recorder(teacher.teacher_kernel)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setattr(triton.runtime.driver, "_active", PretendDriver(capability))
        monkeypatch.setattr(fused, "teacher_kernel", recorder)
        return recorder

    return start


def resources(binary: bytes, folder: Path) -> dict[str, int]:
    """Registers and bytes of stack of the compiled kernel."""
    file = folder / "kernel.cubin"
    file.write_bytes(binary)
    command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("classes", "dtype"),
    [
        (10, torch.float32),  # one small block
        (1000, torch.bfloat16),  # ImageNet
        (8192, torch.float32),  # the widest row that stays in registers
        (21848, torch.bfloat16),  # ImageNet-21k, padded to a multiple of 8: a loop
    ],
)
def test_compiles_for_gpus_that_are_not_here(
    capability: int,
    classes: int,
    dtype: torch.dtype,
    tmp_path: Path,
    pretend: Callable[[int], Recorder],
) -> None:
    """The interpreter takes code that the compiler refuses; and nothing may spill to memory."""
    recorder = pretend(capability)
    logits = torch.zeros(7, classes, dtype=dtype, requires_grad=True)
    target, truth = torch.arange(3), torch.arange(2)
    with losses.use("triton"):
        losses.teacher_loss(logits, target, 2, uda_weight=1.0, feedback=0.1, truth=truth)
    (kernel,) = recorder.compiled
    assembly = kernel.asm  # type: ignore[attr-defined]
    assert f".target sm_{capability}" in assembly["ptx"]
    if classes % 8 == 0:  # 16 bytes at a time
        assert re.search(r"ld\.global\.v(4\.b32|2\.b64)", assembly["ptx"])
    used = resources(assembly["cubin"], tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert 0 < used["REG"] <= 180


@pytest.mark.parametrize(
    "options", [{"pseudo": "strong"}, {"pseudo": torch.arange(2)}, {"truth": torch.arange(2)}]
)
@pytest.mark.parametrize("grad", [False, True])
def test_every_variant_compiles(
    options: dict[str, object], grad: bool, pretend: Callable[[int], Recorder]
) -> None:
    recorder = pretend(90)
    logits = torch.zeros(5, 100, dtype=torch.float16, requires_grad=grad)
    with losses.use("triton"):
        losses.teacher_loss(logits, torch.arange(1), 2, uda_weight=1.0, feedback=0.1, **options)  # type: ignore[arg-type]
    assert len(recorder.compiled) == 1
