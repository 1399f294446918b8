"""What the losses refuse, and the words: before any backend sees it."""

import math
from collections.abc import Callable

import pytest
import torch

from mpl_fast import losses

LOGITS = torch.zeros(7, 4)  # 3 labeled, 2 weak, 2 strong rows of 4 classes
ROWS = LOGITS[:5]  # 3 labeled, 2 strong
TARGET = torch.tensor([0, 1, 2])
PSEUDO = torch.tensor([3, 0])
SOFT = torch.zeros(2, 4)
ONE = torch.ones(())
STUDENT = losses.student_loss
COSINE = losses.cosine_loss
EXACT = losses.exact_feedback
FEEDBACK = losses.mpl_feedback
NEEDS = r"must have shape \(2,\), not \(3,\)"
PLACE = "is on meta, but the logits are on cpu"


def teacher(**options: object) -> None:
    arguments: dict[str, object] = {"uda_weight": 1.0, "feedback": 0.5, **options}
    losses.teacher_loss(LOGITS, TARGET, 2, **arguments)  # type: ignore[arg-type]


def teacher_and_grad(**options: object) -> None:
    arguments: dict[str, object] = {"uda_weight": 1.0, "feedback": 0.5, **options}
    losses.teacher_loss_and_grad(LOGITS, TARGET, 2, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: teacher(threshold=-0.1), "threshold must be a number >= 0, not -0.1"),
        (lambda: teacher(threshold=math.nan), "threshold must be a number >= 0, not nan"),
        (lambda: teacher(temperature=-1.0), "temperature must be positive and finite, not -1"),
        (lambda: teacher(temperature=1e-39), "temperature must be positive and finite"),
        (lambda: teacher(temperature=math.inf), "temperature must be positive and finite"),
        (lambda: teacher(label_smoothing=-0.1), "label_smoothing must be in"),
        (lambda: teacher(label_smoothing=math.nan), "label_smoothing must be in"),
        (lambda: teacher(uda_weight=torch.ones(1)), "uda_weight must be a number or a 0-dim"),
        (lambda: teacher(truth=PSEUDO.to("meta")), f"truth {PLACE}"),
        (lambda: teacher(pseudo=TARGET), f"pseudo {NEEDS}"),
        (lambda: teacher_and_grad(threshold=-0.1), "threshold must be"),
        (lambda: teacher_and_grad(temperature=0.0), "temperature must be"),
        (lambda: teacher_and_grad(grad_scale=torch.ones(1)), r"grad_scale .* \(\), not \(1,\)"),
        (lambda: teacher_and_grad(grad_scale=ONE.to("meta")), f"grad_scale {PLACE}"),
        (lambda: STUDENT(ROWS, SOFT[:, :3], TARGET), r"pseudo must have shape \(2, 4\)"),
        (lambda: STUDENT(ROWS, SOFT[:1], TARGET), r"pseudo must have shape \(2, 4\)"),
        (lambda: STUDENT(ROWS, TARGET, TARGET), f"pseudo {NEEDS}"),
        (lambda: STUDENT(ROWS[:2], PSEUDO, TARGET), "2 rows of logits are less than 3 labeled"),
        (lambda: STUDENT(ROWS, PSEUDO, TARGET[0]), r"target must have shape \(0,\), not \(\)"),
        (lambda: STUDENT(ROWS, PSEUDO, TARGET, weight=torch.ones(3)), f"weight {NEEDS}"),
        (lambda: STUDENT(ROWS, SOFT, TARGET, temperature=0.0), "temperature must be"),
        (lambda: STUDENT(ROWS, SOFT, TARGET, label_smoothing=1.0), "label_smoothing must be"),
        (lambda: STUDENT(ROWS, SOFT.to("meta"), TARGET), f"pseudo {PLACE}"),
        (lambda: STUDENT(ROWS, SOFT, TARGET, num_classes=5), "num_classes is 5"),
        (
            lambda: losses.student_loss_and_grad(ROWS, PSEUDO, TARGET, grad_scale=torch.ones(1)),
            r"grad_scale must have shape \(\), not \(1,\)",
        ),
        (lambda: COSINE(SOFT, TARGET), f"target {NEEDS}"),
        (lambda: COSINE(SOFT, LOGITS), r"target must have shape \(2, 4\), not \(7, 4\)"),
        (lambda: COSINE(SOFT, SOFT, threshold=math.nan), "threshold must be"),
        (lambda: COSINE(SOFT, SOFT, temperature=math.nan), "temperature must be"),
        (lambda: EXACT(SOFT, LOGITS, weight=1.0), r"direction must have shape \(2, 4\)"),
        (lambda: EXACT(SOFT, SOFT, weight=torch.ones(2)), "weight must be a number or a 0-dim"),
        (lambda: EXACT(SOFT, SOFT, weight=1.0, temperature=0.0), "temperature must be"),
        (lambda: EXACT(SOFT[0], SOFT, weight=1.0), "2 dimensions"),
        (lambda: EXACT(SOFT, SOFT, weight=ONE.to("meta")), f"weight {PLACE}"),
        (lambda: teacher(uda_weight=ONE.to("meta")), f"uda_weight {PLACE}"),
        (lambda: teacher(feedback=ONE.to("meta")), f"feedback {PLACE}"),
        (lambda: teacher_and_grad(feedback=ONE.to("meta")), f"feedback {PLACE}"),
        (lambda: FEEDBACK(torch.ones(1), ONE), r"old must be a 0-dim tensor, not \(1,\)"),
        (lambda: FEEDBACK(ONE, ONE, torch.ones(2)), r"average must be a 0-dim tensor, not \(2,\)"),
        (lambda: FEEDBACK(ONE, ONE.to("meta")), "new is on meta, but old is on cpu"),
        (lambda: FEEDBACK(ONE, ONE, ONE.to("meta")), "average is on meta, but old is on cpu"),
        (lambda: FEEDBACK(ONE, ONE, ONE.clone(), momentum=1.5), "momentum must be in"),
    ],
)
def test_shapes_devices_and_numbers(call: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: teacher(threshold=ONE), "threshold must be a number, not a tensor"),
        (lambda: teacher(temperature=ONE), "temperature must be a number, not a tensor"),
        (lambda: teacher(label_smoothing=ONE), "label_smoothing must be a number, not a tensor"),
        (lambda: teacher(pseudo=PSEUDO.float()), "pseudo must be int64, not torch.float32"),
        (lambda: teacher_and_grad(grad_scale=2.0), "grad_scale must be None or a 0-dim tensor"),
        (lambda: teacher_and_grad(grad_scale=ONE.long()), "grad_scale must be floating point"),
        (lambda: STUDENT(ROWS, PSEUDO.int(), TARGET), "pseudo must be int64, not torch.int32"),
        (lambda: STUDENT(ROWS, SOFT.long(), TARGET), "pseudo must be floating point"),
        (lambda: STUDENT(ROWS, PSEUDO, TARGET, weight=PSEUDO), "weight must be floating point"),
        (lambda: COSINE(SOFT, SOFT.bool()), "target must be floating point, not torch.bool"),
        (lambda: COSINE(SOFT, PSEUDO.bool()), "target must be int64, not torch.bool"),
        (lambda: EXACT(SOFT, SOFT.long(), weight=1.0), "direction must be floating point"),
        (lambda: FEEDBACK(1.5, ONE), "old must be a 0-dim tensor, not 1.5"),  # type: ignore[arg-type]
        (lambda: FEEDBACK(ONE, 1), "new must be a 0-dim tensor, not 1"),  # type: ignore[arg-type]
        (lambda: FEEDBACK(ONE, ONE, 0.0), "average must be a 0-dim tensor, not 0.0"),  # type: ignore[arg-type]
        (lambda: FEEDBACK(ONE, ONE.long()), "new must be floating point, not torch.int64"),
        (lambda: FEEDBACK(ONE, ONE, ONE.double()), "average must be float32, as the feedback is"),
        (lambda: FEEDBACK(ONE, ONE, ONE.half()), "average must be float32, .* not torch.float16"),
        (
            lambda: losses.pseudo_labels(SOFT, uniforms=PSEUDO),
            "uniforms must be floating point, not torch.int64",
        ),
    ],
)
def test_types(call: Callable[[], object], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        call()


def test_bounds_that_are_fine() -> None:
    teacher(threshold=0, temperature=1, label_smoothing=0)
    teacher(threshold=math.inf, temperature=1e-38)
    teacher_and_grad(grad_scale=ONE.half(), pseudo=PSEUDO)
    assert losses.mpl_feedback(ONE, ONE, ONE.clone(), momentum=1.0).item() == -1.0


def test_triton_is_not_given_float64() -> None:
    """Its kernels add up in float32: the answer would look more exact than it is."""
    with losses.use("triton"), pytest.raises(TypeError, match="know no float64"):
        losses.smoothed_ce(LOGITS.double(), torch.zeros(7, dtype=torch.int64))
