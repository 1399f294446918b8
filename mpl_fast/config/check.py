"""What is wrong with the values of a config, in one line each; types are checked already."""

import dataclasses
from typing import Any

from mpl_fast.config.algorithms import (
    ConsistencyConfig,
    FinetuneConfig,
    FixMatchConfig,
    MetaSemiConfig,
    MPLConfig,
    RolePlayConfig,
    SMPLConfig,
)
from mpl_fast.config.learner import LearnerConfig
from mpl_fast.config.run import LABELED_ONLY, AlgorithmConfig, DataConfig, RunConfig

Range = tuple[str, Any, str, bool]  # key, value, the rule in words, and whether the value keeps it
AT_LEAST_0 = (
    "weight",
    "ramp",
    "feedback_ramp",
    "label_rate",
    "mixup",
    "swap_every",
    "student_delay_steps",
)
SHARES = ("threshold", "label_threshold")
WHOLE = ("smpl", "metasemi")  # recipes that do not compute a batch in parts
BELOW_1 = ("label_smoothing", "baseline", "held_out")


def problems(config: RunConfig) -> list[str]:
    """What is wrong with the values, one line each, the key's name first."""
    found = [
        f"{key} must be {rule}, not {value}"
        for key, value, rule, fine in _ranges(config)
        if not fine
    ]
    found += [f"algorithm.{words}" for words in _contradictions(config.algorithm)]
    found += _about_weights(config) + _about_parts(config)
    found += _about_graphs(config) + _about_apex(config) + _about_norms(config)
    if not config.run_dir:
        found.append("run_dir is missing: give --run-dir FOLDER")
    if not config.data.root:
        found.append("data.root is missing: give --data.root FOLDER, as tools/make_rec.py wrote it")
    return found


def _about_norms(config: RunConfig) -> list[str]:
    if config.model.norm == "sync" and config.compile != "off":
        return ["model.norm sync cannot be compiled: set --compile off, or norm batch"]
    return []


def _about_apex(config: RunConfig) -> list[str]:
    found = []
    for part in dataclasses.fields(config.algorithm):
        learner = getattr(config.algorithm, part.name)
        if isinstance(learner, LearnerConfig) and learner.optimizer_backend == "apex":
            key = f"algorithm.{part.name}.optimizer_backend apex"
            if learner.optimizer != "sgd":
                found.append(f"{key} is for optimizer sgd: take torch")
            if config.cuda_graphs == "step":
                found.append(f"{key} takes its learning rate by value: set cuda_graphs model")
    return found


def _about_graphs(config: RunConfig) -> list[str]:
    kind, feedback = config.cuda_graphs, getattr(config.algorithm, "feedback", "off")
    if kind == "model" and config.compile == "off":
        return ["cuda_graphs model is of compiled networks: give --compile default as well"]
    if kind != "step":
        return []
    held = getattr(config.algorithm, "teacher_graph", "hold") == "hold"
    plain = feedback in ("off", "difference", "sampled") and config.recipe != "metasemi" and held
    if not plain:
        return [
            "cuda_graphs step cannot repeat a step that draws its dropout again: take model, or "
            "another feedback (off, difference, sampled) with teacher_graph hold"
        ]
    if config.grad_sync == "ddp":
        return ["cuda_graphs step needs grad_sync allreduce: DDP's buckets cannot be captured"]
    return []


def _about_parts(config: RunConfig) -> list[str]:
    if config.microbatches > 1 and config.grad_sync == "ddp":
        return ["microbatches above 1 need grad_sync allreduce: DDP exchanges after every part"]
    parity = getattr(config.algorithm, "feedback", "").startswith("parity_")
    if config.microbatches > 1 and (config.recipe in WHOLE or parity):
        who = f"feedback {config.algorithm.feedback}" if parity else f"recipe {config.recipe}"  # type: ignore[union-attr]
        return [f"microbatches must be 1 for {who}, whose step takes its batch whole"]
    return []


def _ranges(config: RunConfig) -> list[Range]:
    least = {
        "steps": 1,
        "microbatches": 1,
        "labeled_batch": 1,
        "eval_batch": 1,
        "log_every": 1,
        "checkpoint_keep": 2,
    }
    at_zero = ("epochs", "eval_every", "eval_epochs", "checkpoint_every", "stop_at", "seed")
    rows: list[Range] = []
    for key in (*least, *at_zero):
        value, low = getattr(config, key), least.get(key, 0)
        rows.append((key, value, f"at least {low}", value >= low))
    unlabeled = config.unlabeled_batch
    enough = unlabeled >= 1 or config.recipe in LABELED_ONLY
    rows.append(("unlabeled_batch", unlabeled, f"at least 1 for recipe {config.recipe}", enough))
    momentum = config.model.norm_momentum
    rows.append(("model.norm_momentum", momentum, "in [0, 1]", 0 <= momentum <= 1))
    rows.append(("model.classes", config.model.classes, "at least 0", config.model.classes >= 0))
    return rows + _data_ranges(config.data) + _algorithm_ranges(config.algorithm)


def _data_ranges(data: DataConfig) -> list[Range]:
    least = {"image_size": 8, "num_ops": 0, "magnitude": 0, "cutout": 0, "final_cutout": 0}
    least |= {"threads": 0, "prefetch": 1, "shuffle_buffer": 1}
    rows: list[Range] = [
        (f"data.{key}", getattr(data, key), f"at least {low}", getattr(data, key) >= low)
        for key, low in least.items()
    ]
    rows.append(("data.eval_crop", data.eval_crop, "in (0, 1]", 0 < data.eval_crop <= 1))
    load = data.hw_decoder_load
    rows.append(("data.hw_decoder_load", load, "in [0, 1]", 0 <= load <= 1))
    rows += [("data.std", value, "above 0", value > 0) for value in data.std]
    return rows


def _algorithm_ranges(part: Any, at: str = "algorithm") -> list[Range]:
    """Of an algorithm's config and the configs in it, whichever of the known keys they have."""
    rows: list[Range] = []
    for item in dataclasses.fields(part):
        key, value = f"{at}.{item.name}", getattr(part, item.name)
        if isinstance(value, LearnerConfig):
            rows += _learner_ranges(value, key)
        elif isinstance(value, ConsistencyConfig):
            rows.append((f"{key}.temperature", value.temperature, "above 0", value.temperature > 0))
            rows += _algorithm_ranges(value, key)
        elif item.name in SHARES:
            rows.append((key, value, "in [0, 1]", 0 <= value <= 1))
        elif item.name in AT_LEAST_0:
            rows.append((key, value, "at least 0", value >= 0))
        elif item.name in BELOW_1:
            rows.append((key, value, "in [0, 1)", 0 <= value < 1))
        elif item.name == "epsilon":
            rows.append((key, value, "above 0", value > 0))
    return rows


def _learner_ranges(learner: LearnerConfig, at: str) -> list[Range]:
    rows: list[Range] = []
    for key in ("lr", "weight_decay", "max_grad_norm", "warmup", "delay_steps", "gamma"):
        value = getattr(learner, key)
        rows.append((f"{at}.{key}", value, "at least 0", value >= 0))
    for key in ("momentum", "ema", "dropout"):
        value = getattr(learner, key)
        rows.append((f"{at}.{key}", value, "in [0, 1)", 0 <= value < 1))
    nesterov = learner.optimizer == "sgd" and learner.nesterov
    if nesterov and learner.momentum == 0:
        rows.append((f"{at}.momentum", 0, "above 0 (Nesterov)", False))
    steps = learner.milestones
    if learner.schedule == "step":
        fine = steps != () and steps[0] >= 0 and list(steps) == sorted({*steps})
        rows.append((f"{at}.milestones", steps, "the rising steps of schedule step", fine))
    elif steps:
        rows.append((f"{at}.milestones", steps, f"empty for schedule {learner.schedule}", False))
    return rows


def _about_weights(config: RunConfig) -> list[str]:
    """The weights that a run begins with."""
    tuning, model = config.recipe == "finetune", config.model
    if tuning and model.pretrained:
        return ["model.pretrained is not for recipe finetune, which begins with algorithm.start"]
    if model.frozen and not (tuning or model.pretrained):
        return ["model.frozen would keep random weights: give --model.pretrained FILE too"]
    return []


def _contradictions(a: AlgorithmConfig) -> list[str]:
    """Values that are right one by one and wrong together."""
    if isinstance(a, FinetuneConfig) and not a.start:
        return ["start is missing: give --algorithm.start RUN_DIR, whose checkpoint is tuned"]
    if isinstance(a, SMPLConfig) and a.feedback == "exact":
        return _needs_sgd("learner", a.learner)
    if isinstance(a, FixMatchConfig | MetaSemiConfig) or not isinstance(a, MPLConfig):
        return []
    found = []
    if a.baseline and a.feedback not in ("difference", "sampled", "parity_google"):
        found.append(f"baseline is subtracted from a difference: feedback {a.feedback} has none")
    if a.feedback in ("exact", "per_example"):
        found += _needs_sgd("student", a.student)
        if isinstance(a, RolePlayConfig):
            found += _needs_sgd("teacher", a.teacher)
    wanted = {"exact": "soft", "sampled": "sampled", "per_example": "sampled"}.get(a.feedback)
    if wanted and a.label_kind != wanted:
        found.append(f"feedback {a.feedback} needs labels {wanted} (or auto), not {a.labels}")
    if a.feedback == "difference" and a.label_kind == "soft":
        found.append(
            "feedback difference has no gradient for labels soft: take feedback exact, or labels "
            "argmax"
        )
    if a.feedback == "difference" and a.label_kind == "sampled":
        found.append("labels sampled need feedback sampled, which credits the view they come from")
    if a.feedback == "off" and a.held_out:
        found.append("held_out is for a feedback to judge by: feedback is off")
    if a.feedback.startswith("parity_"):
        found += _parity(a)
    return found


def _needs_sgd(name: str, learner: LearnerConfig) -> list[str]:
    if learner.optimizer == "sgd":
        return []
    return [f"{name}.optimizer must be sgd for this feedback: it follows the step of plain SGD"]


def _parity(a: MPLConfig) -> list[str]:
    """The codes that are imitated know none of these."""
    if isinstance(a, RolePlayConfig):
        return [f"feedback {a.feedback} is for recipe mpl: it does not swap roles"]
    changed = {
        "labels": a.labels != "auto",
        "pseudo": a.pseudo != "weak",
        "label_threshold": a.label_threshold != 0,
        "held_out": a.held_out != 0,
        "bn_batches": a.bn_batches != "joint",
        "teacher_graph": a.teacher_graph != "hold",
        "consistency.measure": a.consistency.measure != "cross_entropy",
    }
    return [
        f"{key} cannot be chosen with feedback {a.feedback}" for key, no in changed.items() if no
    ]
