"""The public losses: the choice of a backend, refused arguments, and no value read on the host."""

import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mpl_fast import losses
from mpl_fast.kernels import reference
from tests.kernels.cases import LOSSES, Arguments

LOGITS = torch.zeros(7, 4)  # 3 labeled, 2 weak, 2 strong rows of 4 classes
TARGET = torch.tensor([0, 1, 2])
PSEUDO = torch.tensor([3, 0])
SOFT = torch.zeros(2, 4)
ONE = torch.ones(())
STUDENT, STUDENT_AND_GRAD = losses.student_loss, losses.student_loss_and_grad
CE, COSINE, EXACT = losses.smoothed_ce, losses.cosine_loss, losses.exact_feedback
FEEDBACK, LABELS = losses.mpl_feedback, losses.pseudo_labels
SHAPE = r"must have shape \(2,\), not \(3,\)"
PLACE = "is on meta, but the logits are on cpu"


def teacher(
    logits: Tensor = LOGITS, target: Tensor = TARGET, n: int = 2, **options: object
) -> None:
    arguments: dict[str, object] = {"uda_weight": 1.0, "feedback": 0.5, **options}
    losses.teacher_loss_and_grad(logits, target, n, **arguments)  # type: ignore[arg-type]


VALUES: list[tuple[Callable[[], object], str]] = [
    (lambda: teacher(n=3), "7 rows of logits are not 3 labeled"),
    (lambda: teacher(n=-1), "-1 unlabeled"),
    (lambda: teacher(LOGITS[0]), "2 dimensions"),
    (lambda: teacher(LOGITS[:, :0]), "at least one class"),
    (lambda: teacher(target=TARGET[0]), r"0 labeled"),
    (lambda: teacher(temperature=0.0), "temperature must be positive and finite, not 0"),
    (lambda: teacher(temperature=-1.0), "temperature must be positive and finite, not -1"),
    (lambda: teacher(temperature=1e-39), "temperature must be positive and finite"),
    (lambda: teacher(temperature=math.inf), "temperature must be positive and finite"),
    (lambda: teacher(temperature=math.nan), "temperature must be positive and finite"),
    (lambda: teacher(threshold=-0.1), "threshold must be a number >= 0, not -0.1"),
    (lambda: teacher(threshold=math.nan), "threshold must be a number >= 0, not nan"),
    (lambda: teacher(label_smoothing=-0.1), "label_smoothing must be in"),
    (lambda: teacher(label_smoothing=1.0), "label_smoothing must be in"),
    (lambda: teacher(label_smoothing=math.nan), "label_smoothing must be in"),
    (lambda: teacher(uda_weight=torch.ones(1)), "uda_weight must be a number or a 0-dim"),
    (lambda: teacher(feedback=torch.ones(1)), "feedback must be a number or a 0-dim"),
    (lambda: teacher(uda_weight=ONE.to("meta")), f"uda_weight {PLACE}"),
    (lambda: teacher(feedback=ONE.to("meta")), f"feedback {PLACE}"),
    (lambda: teacher(pseudo=TARGET), f"pseudo {SHAPE}"),
    (lambda: teacher(pseudo="soft"), "pseudo must be 'weak'"),
    (lambda: teacher(truth=TARGET), f"truth {SHAPE}"),
    (lambda: teacher(truth=PSEUDO.to("meta")), f"truth {PLACE}"),
    (lambda: CE(LOGITS, TARGET), r"target must have shape \(7,\)"),
    (lambda: CE(SOFT, PSEUDO, label_smoothing=1.0), "label_smoothing must be in"),
    (lambda: STUDENT(SOFT, SOFT[:, :3]), r"pseudo must have shape \(2, 4\)"),
    (lambda: STUDENT(SOFT, SOFT[:1]), r"pseudo must have shape \(2, 4\)"),
    (lambda: STUDENT(SOFT, TARGET), f"pseudo {SHAPE}"),
    (lambda: STUDENT(SOFT, TARGET[0]), r"pseudo must have shape \(2,\), not \(\)"),
    (lambda: STUDENT(SOFT, PSEUDO, weight=torch.ones(3)), f"weight {SHAPE}"),
    (lambda: STUDENT(SOFT, SOFT, label_smoothing=1.0), "label_smoothing must be in"),
    (lambda: STUDENT(SOFT, SOFT.to("meta")), f"pseudo {PLACE}"),
    (lambda: STUDENT_AND_GRAD(SOFT, TARGET), f"pseudo {SHAPE}"),
    (lambda: STUDENT_AND_GRAD(SOFT, SOFT, label_smoothing=1.0), "label_smoothing must be in"),
    (lambda: COSINE(SOFT, PSEUDO), r"target must have shape \(2, 4\), not \(2,\)"),
    (lambda: COSINE(SOFT, LOGITS), r"target must have shape \(2, 4\), not \(7, 4\)"),
    (lambda: COSINE(SOFT, SOFT, threshold=math.nan), "threshold must be"),
    (lambda: COSINE(SOFT, SOFT, temperature=math.nan), "temperature must be"),
    (lambda: EXACT(SOFT, LOGITS, weight=1.0), r"direction must have shape \(2, 4\)"),
    (lambda: EXACT(SOFT[0], SOFT, weight=1.0), "2 dimensions"),
    (lambda: EXACT(SOFT, SOFT, weight=torch.ones(2)), "weight must be a number or a 0-dim"),
    (lambda: EXACT(SOFT, SOFT, weight=ONE.to("meta")), f"weight {PLACE}"),
    (lambda: LABELS(LOGITS, uniforms=torch.rand(3)), r"uniforms must have shape \(7,\)"),
    (lambda: FEEDBACK(torch.ones(1), ONE), r"old must be a 0-dim tensor, not \(1,\)"),
    (lambda: FEEDBACK(ONE, ONE, torch.ones(2)), r"average must be a 0-dim tensor, not \(2,\)"),
    (lambda: FEEDBACK(ONE, ONE.to("meta")), "new is on meta, but old is on cpu"),
    (lambda: FEEDBACK(ONE, ONE, ONE.to("meta")), "average is on meta, but old is on cpu"),
    (lambda: FEEDBACK(ONE, ONE, ONE.clone(), momentum=1.5), "momentum must be in"),
]
TYPES: list[tuple[Callable[[], object], str]] = [
    (lambda: teacher(LOGITS.long()), "logits must be floating point"),
    (lambda: teacher(target=TARGET.int()), "target must be int64"),
    (lambda: teacher(threshold=ONE), "threshold must be a number, not a tensor"),
    (lambda: teacher(temperature=ONE), "temperature must be a number, not a tensor"),
    (lambda: teacher(label_smoothing=ONE), "label_smoothing must be a number, not a tensor"),
    (lambda: teacher(pseudo=PSEUDO.float()), "pseudo must be int64, not torch.float32"),
    (lambda: STUDENT(SOFT, PSEUDO.int()), "pseudo must be int64, not torch.int32"),
    (lambda: STUDENT(SOFT, SOFT.long()), "pseudo must be floating point"),
    (lambda: STUDENT(SOFT, PSEUDO, weight=PSEUDO), "weight must be floating point"),
    (lambda: COSINE(SOFT, SOFT.bool()), "target must be floating point, not torch.bool"),
    (lambda: EXACT(SOFT, SOFT.long(), weight=1.0), "direction must be floating point"),
    (lambda: LABELS(SOFT, uniforms=PSEUDO), "uniforms must be floating point"),
    (lambda: FEEDBACK(1.5, ONE), "old must be a 0-dim tensor, not 1.5"),  # type: ignore[arg-type]
    (lambda: FEEDBACK(ONE, 1), "new must be a 0-dim tensor, not 1"),  # type: ignore[arg-type]
    (lambda: FEEDBACK(ONE, ONE, 0.0), "average must be a 0-dim tensor, not 0.0"),  # type: ignore[arg-type]
    (lambda: FEEDBACK(ONE, ONE.long()), "new must be floating point, not torch.int64"),
    (lambda: FEEDBACK(ONE, ONE, ONE.double()), "average must be float32, as the feedback is"),
    (lambda: FEEDBACK(ONE, ONE, ONE.half()), "average must be float32, .* not torch.float16"),
    (lambda: FEEDBACK(ONE, ONE, momentum=ONE), "momentum must be a number"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [*((ValueError, *case) for case in VALUES), *((TypeError, *case) for case in TYPES)],
)
def test_what_cannot_be_right_is_refused(
    error: type[Exception], call: Callable[[], object], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_bounds_that_are_allowed() -> None:
    teacher(threshold=0, temperature=1, label_smoothing=0)
    teacher(threshold=math.inf, temperature=1e-38, pseudo=PSEUDO)
    assert losses.mpl_feedback(ONE, ONE, ONE.clone(), momentum=1.0).item() == -1.0


def test_use_forces_a_backend_and_restores_the_choice() -> None:
    fused = pytest.importorskip("mpl_fast.kernels.fused", exc_type=ImportError)
    assert losses.backend(LOGITS) is reference
    with losses.use("triton"):
        assert losses.backend(LOGITS) is fused
        with losses.use("reference"):
            assert losses.backend(LOGITS) is reference
        assert losses.backend(LOGITS) is fused
    assert losses.backend(LOGITS) is reference


def test_triton_is_not_given_float64() -> None:
    """Its kernels add up in float32: the answer would look more exact than it is."""
    with losses.use("triton"), pytest.raises(TypeError, match="do not support float64"):
        losses.smoothed_ce(LOGITS.double(), torch.zeros(7, dtype=torch.int64))


@pytest.mark.gpu
def test_cuda_logits_are_for_the_kernels() -> None:
    from mpl_fast.kernels import fused

    assert losses.backend(LOGITS.cuda()) is fused
    assert losses.backend(LOGITS.cuda().double()) is reference


@pytest.mark.slow
def test_environment_variable_is_checked() -> None:
    environment = {**os.environ, "MPL_FAST_LOSSES": "tritn"}
    command = [sys.executable, "-c", "import mpl_fast.losses"]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert out.returncode != 0
    assert "MPL_FAST_LOSSES is 'tritn'; it may be auto, triton, reference" in out.stderr


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_reads_a_value_on_the_host(name: str) -> None:
    """Meta tensors have no values: whatever would wait for a GPU raises an error here."""
    x, scalar = torch.empty(12, 16, device="meta"), torch.empty((), device="meta")
    label = torch.empty(12, dtype=torch.int64, device="meta")
    weight = torch.empty(12, device="meta")
    a = Arguments(label, x.clone(), weight, 0.1, 0.7, 0.5, scalar, scalar)
    answer = LOSSES[name](x, a)
    assert answer.gradient.shape == ((0, 16) if name == "pseudo" else (12, 16))
    h = losses.mpl_feedback(scalar, scalar, scalar.clone())
    sampled = losses.pseudo_labels(x, uniforms=weight)
    assert all(y.device.type == "meta" for y in (*answer.outputs.values(), h, *sampled))
