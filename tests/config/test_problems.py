"""Values out of range, and values that are right one by one and wrong together."""

import re

import pytest

from mpl_fast.config import RECIPES, AlgorithmConfig, RunConfig, problems
from mpl_fast.config.algorithms import MPLConfig, RolePlayConfig, SMPLConfig
from mpl_fast.config.command_line import parse
from mpl_fast.config.fields import all_options
from mpl_fast.config.values import convert
from mpl_fast.errors import ConfigError

HERE = ["--run-dir", "r", "--data.root", "d"]
RANGES = {  # options, refused values, words
    "at least 1": (
        [
            "steps",
            "labeled_batch",
            "eval_batch",
            "log_every",
            "microbatches",
            "data.prefetch",
            "data.shuffle_buffer",
        ],
        ["0", "-4"],
    ),
    "at least 2": (["checkpoint_keep"], ["1"]),
    "at least 8": (["data.image_size"], ["7"]),
    "at least 0": (
        [
            "epochs",
            "eval_every",
            "eval_epochs",
            "checkpoint_every",
            "stop_at",
            "seed",
            "unlabeled_batch",
            "model.classes",
            "data.num_ops",
            "data.magnitude",
            "data.cutout",
            "data.final_cutout",
            "data.threads",
            "algorithm.feedback_ramp",
            "algorithm.consistency.weight",
            "algorithm.consistency.ramp",
            "algorithm.teacher.lr",
            "algorithm.teacher.weight_decay",
            "algorithm.teacher.max_grad_norm",
            "algorithm.teacher.warmup",
            "algorithm.teacher.delay_steps",
            "algorithm.teacher.gamma",
            "supervised: algorithm.mixup",
            "fixmatch: algorithm.weight",
            "mpl_roleplay: algorithm.swap_every",
            "mpl_roleplay: algorithm.student_delay_steps",
            "smpl: algorithm.feedback_ramp",
            "metasemi: algorithm.weight",
            "metasemi: algorithm.ramp",
            "metasemi: algorithm.mixup",
            "metasemi: algorithm.label_rate",
        ],
        ["-1"],
    ),
    "above 0": (["algorithm.consistency.temperature", "metasemi: algorithm.epsilon"], ["0", "-1"]),
    "in [0, 1]": (
        [
            "model.norm_momentum",
            "data.hw_decoder_load",
            "algorithm.label_threshold",
            "algorithm.consistency.threshold",
            "fixmatch: algorithm.threshold",
        ],
        ["1.5", "-0.5"],
    ),
    "in (0, 1]": (["data.eval_crop"], ["0.0", "1.5"]),
    "in [0, 1)": (
        [
            "algorithm.label_smoothing",
            "algorithm.baseline",
            "algorithm.held_out",
            "algorithm.student.momentum",
            "algorithm.student.ema",
            "algorithm.student.dropout",
            "supervised: algorithm.label_smoothing",
            "finetune: algorithm.label_smoothing",
            "uda: algorithm.label_smoothing",
            "fixmatch: algorithm.label_smoothing",
            "smpl: algorithm.label_smoothing",
        ],
        ["1.0", "-0.5"],
    ),
}
CASES = [
    (option, value, words)
    for words, (options, values) in RANGES.items()
    for option in options
    for value in values
]


@pytest.mark.parametrize(("option", "value", "words"), CASES)
def test_a_value_out_of_range_is_refused(option: str, value: str, words: str) -> None:
    recipe, _, key = option.rpartition(": ")
    start = ["--algorithm.start=s"] if recipe == "finetune" else []
    (kind,) = [
        o.kind for o in all_options(RunConfig(algorithm=RECIPES[recipe or "mpl"]())) if o.key == key
    ]
    message = re.escape(f"{key} must be {words}, not {convert(value, kind)}")
    with pytest.raises(ConfigError, match=f"^{message}$"):
        parse([*HERE, f"--recipe={recipe or 'mpl'}", *start, f"--{key}={value}"])


def test_each_number_of_a_list_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"data\.std must be above 0, not 0\.0"):
        parse([*HERE, "--data.std=[0.2,0,0.3]"])


EXACT, ROLES = "--algorithm.feedback=exact", "--recipe=mpl_roleplay"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            [EXACT, "--algorithm.labels=argmax"],
            "algorithm.feedback exact needs labels soft (or auto), not argmax",
        ),
        (
            ["--algorithm.feedback=sampled", "--algorithm.labels=soft"],
            "algorithm.feedback sampled needs labels sampled (or auto), not soft",
        ),
        (["--algorithm.labels=soft"], "algorithm.feedback difference has no gradient"),
        (
            ["--algorithm.labels=sampled"],
            "algorithm.labels sampled need feedback sampled, which uses the view they come from",
        ),
        (
            [EXACT, "--algorithm.student.optimizer=adamw"],
            "algorithm.student.optimizer must be sgd for this feedback",
        ),
        (
            [ROLES, "--algorithm.feedback=per_example", "--algorithm.teacher.optimizer=adamw"],
            "algorithm.teacher.optimizer must be sgd for this feedback",
        ),
        (
            ["--recipe=smpl", EXACT, "--algorithm.learner.optimizer=adamw"],
            "algorithm.learner.optimizer must be sgd for this feedback",
        ),
        (
            [ROLES, "--algorithm.feedback=parity_kekmodel"],
            "algorithm.feedback parity_kekmodel is for recipe mpl",
        ),
        (
            ["--algorithm.feedback=parity_google", "--algorithm.bn-batches=split"],
            "algorithm.bn_batches cannot be chosen with feedback parity_google",
        ),
        (
            ["--algorithm.feedback=parity_kekmodel", "--algorithm.consistency.measure=cosine"],
            "algorithm.consistency.measure cannot be chosen with feedback parity_kekmodel",
        ),
        (
            [EXACT, "--algorithm.baseline=0.9"],
            "algorithm.baseline cannot be subtracted from feedback exact",
        ),
        (
            ["--algorithm.feedback=off", "--algorithm.held-out=0.5"],
            "algorithm.held_out is for the feedback, which is off",
        ),
        (["--cuda-graphs=model"], "cuda_graphs model is for compiled networks: give --compile"),
        (
            ["--cuda-graphs=step", EXACT],
            "cuda_graphs step cannot capture feedback exact, whose step draws the same dropout",
        ),
        (
            ["--cuda-graphs=step", "--algorithm.teacher-graph=recompute"],
            "cuda_graphs step cannot capture teacher_graph recompute",
        ),
        (
            ["--cuda-graphs=step", "--recipe=metasemi"],
            "cuda_graphs step cannot capture recipe metasemi",
        ),
        (["--cuda-graphs=step", "--grad-sync=ddp"], "cuda_graphs step needs grad_sync allreduce"),
        (
            ["--cuda-graphs=step", "--algorithm.student.optimizer-backend=apex"],
            "algorithm.student.optimizer_backend apex reads its learning rate on the host",
        ),
        (
            [
                "--algorithm.teacher.optimizer-backend=apex",
                "--algorithm.teacher.optimizer=adamw",
            ],
            "algorithm.teacher.optimizer_backend apex is for optimizer sgd: set torch",
        ),
        (["--microbatches=2", "--grad-sync=ddp"], "microbatches above 1 need grad_sync allreduce"),
        (
            ["--recipe=smpl", "--microbatches=2"],
            "microbatches must be 1 for recipe smpl, whose step needs the whole batch at once",
        ),
        (
            ["--algorithm.feedback=parity_google", "--microbatches=2"],
            "microbatches must be 1 for feedback parity_google",
        ),
        (["--model.norm=sync", "--compile=default"], "model.norm sync cannot be compiled"),
        (["--recipe=finetune"], "algorithm.start is missing: give --algorithm.start RUN_DIR"),
        (
            ["--recipe=finetune", "--algorithm.start=s", "--model.pretrained=timm"],
            "model.pretrained is not for recipe finetune, which starts from algorithm.start",
        ),
        (
            ["--model.frozen=true"],
            "model.frozen would keep random weights: give --model.pretrained",
        ),
        (["--algorithm.teacher.momentum=0"], "algorithm.teacher.momentum must be above 0"),
        (
            ["--algorithm.teacher.milestones=[100]"],
            "algorithm.teacher.milestones must be empty for schedule cosine, not (100,)",
        ),
        (
            ["--algorithm.student.schedule=step"],
            "algorithm.student.milestones must be the rising steps of schedule step, not ()",
        ),
        (
            ["--algorithm.student.schedule=step", "--algorithm.student.milestones=[9,5]"],
            "algorithm.student.milestones must be the rising steps of schedule step, not (9, 5)",
        ),
        (
            ["--recipe=fixmatch", "--unlabeled-batch=0"],
            "unlabeled_batch must be at least 1 for recipe fixmatch, not 0",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_contradiction_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        parse([*HERE, *options])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", [0, 2])
def test_missing_folders_are_refused(missing: int) -> None:
    with pytest.raises(ConfigError, match="is missing: give --"):
        parse(HERE[missing : missing + 2])


@pytest.mark.parametrize("kind", RECIPES.values())
def test_defaults_have_no_problem_but_what_is_missing(kind: type[AlgorithmConfig]) -> None:
    assert all(" is missing: give --" in line for line in problems(RunConfig(algorithm=kind())))


def test_labeled_only_recipes_need_no_unlabeled_batch() -> None:
    assert parse([*HERE, "--recipe=supervised", "--unlabeled-batch=0"]).unlabeled_batch == 0


@pytest.mark.parametrize(
    ("config", "repeats", "whole"),
    [
        (MPLConfig(), None, None),
        (MPLConfig(feedback="sampled"), None, None),
        (MPLConfig(feedback="per_example"), "feedback per_example", None),
        (MPLConfig(teacher_graph="recompute"), "teacher_graph recompute", None),
        (MPLConfig(feedback="parity_google"), *["feedback parity_google"] * 2),
        (RolePlayConfig(feedback="exact"), "feedback exact", None),
        (SMPLConfig(), None, "recipe smpl"),
        (SMPLConfig(feedback="exact"), "feedback exact", "recipe smpl"),
    ],
)
def test_what_rules_out_graphs_and_microbatches(
    config: AlgorithmConfig, repeats: str | None, whole: str | None
) -> None:
    assert (config.repeats_draws, config.whole_batch) == (repeats, whole)
