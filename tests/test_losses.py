"""The public losses: which backend serves them, and what they refuse."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mpl_fast import losses
from mpl_fast.kernels import reference

LOGITS = torch.zeros(7, 4)  # 3 labeled, 2 weak, 2 strong rows of 4 classes
TARGET = torch.tensor([0, 1, 2])
PSEUDO = torch.tensor([3, 0])


def teacher(
    logits: Tensor = LOGITS, target: Tensor = TARGET, n: int = 2, **options: object
) -> None:
    arguments: dict[str, object] = {"uda_weight": 1.0, "feedback": 0.5, **options}
    losses.teacher_loss(logits, target, n, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: teacher(n=3), ValueError, "7 rows of logits are not 3 labeled"),
        (lambda: teacher(n=-1), ValueError, "-1 unlabeled"),
        (lambda: teacher(LOGITS[0]), ValueError, "2 dimensions"),
        (lambda: teacher(LOGITS.long()), TypeError, "floating point"),
        (lambda: teacher(target=TARGET.int()), TypeError, "target must be int64"),
        (lambda: teacher(temperature=0.0), ValueError, "temperature must be positive"),
        (lambda: teacher(temperature=float("nan")), ValueError, "temperature must be positive"),
        (lambda: teacher(label_smoothing=1.0), ValueError, "label_smoothing must be in"),
        (lambda: teacher(num_classes=5), ValueError, "num_classes is 5"),
        (lambda: teacher(num_classes=0), ValueError, "num_classes is 0"),
        (lambda: teacher(feedback=torch.ones(1)), ValueError, "feedback must be a number"),
        (lambda: teacher(pseudo=TARGET), ValueError, r"pseudo must have shape \(2,\)"),
        (lambda: teacher(pseudo="soft"), ValueError, "pseudo must be 'weak'"),
        (lambda: teacher(truth=TARGET), ValueError, r"truth must have shape \(2,\)"),
        (lambda: losses.smoothed_ce(LOGITS, TARGET), ValueError, r"shape \(7,\)"),
        (lambda: losses.student_loss(LOGITS, PSEUDO, TARGET), ValueError, r"pseudo .* \(4,\)"),
        (
            lambda: losses.student_loss(LOGITS[:2], PSEUDO, weight=torch.ones(3)),
            ValueError,
            r"weight must have shape \(2,\)",
        ),
        (
            lambda: losses.pseudo_labels(LOGITS, uniforms=torch.rand(3)),
            ValueError,
            r"uniforms must have shape \(7,\)",
        ),
    ],
)
def test_refuses_with_the_number_that_is_wrong(
    call: Callable[[], None], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        call()


def test_cpu_logits_go_to_the_reference() -> None:
    assert losses.backend(LOGITS) is reference


def test_use_forces_a_backend_and_gives_the_choice_back() -> None:
    fused = pytest.importorskip("mpl_fast.kernels.fused", exc_type=ImportError)
    with losses.use("triton"):
        assert losses.backend(LOGITS) is fused
        with losses.use("reference"):
            assert losses.backend(LOGITS) is reference
        assert losses.backend(LOGITS) is fused
    assert losses.backend(LOGITS) is reference


def test_environment_variable_is_checked() -> None:
    environment = {**os.environ, "MPL_FAST_LOSSES": "tritn"}
    command = [sys.executable, "-c", "import mpl_fast.losses"]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert out.returncode != 0
    assert "MPL_FAST_LOSSES is 'tritn'; it may be auto, triton, reference" in out.stderr


def test_weights_are_constants() -> None:
    logits = torch.randn(7, 4, requires_grad=True)
    weights = [torch.tensor(0.7, requires_grad=True) for _ in range(2)]
    out = losses.teacher_loss(logits, TARGET, 2, uda_weight=weights[0], feedback=weights[1])
    out.loss.backward()
    assert [w.grad for w in weights] == [None, None]
    differentiable = [name for name, x in out._asdict().items() if x.requires_grad]
    assert differentiable == ["loss", "sup", "uda", "mpl"]


@pytest.mark.gpu
def test_triton_serves_a_gpu_and_agrees_with_the_reference() -> None:
    logits = torch.randn(20, 1000, device="cuda", requires_grad=True)
    target = torch.arange(4, device="cuda")
    results = {}
    for name in ("triton", "reference"):
        with losses.use("triton" if name == "triton" else "reference"):
            out = losses.teacher_loss(logits, target, 8, uda_weight=8.0, feedback=-0.3)
        (gradient,) = torch.autograd.grad(out.loss, logits)
        results[name] = [*out[:-1], gradient]
        assert (out.label == logits[4:12].argmax(-1)).all()
    torch.testing.assert_close(results["triton"], results["reference"], rtol=1e-5, atol=1e-7)
