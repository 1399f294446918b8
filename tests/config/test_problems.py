"""Values out of range, and values that are right one by one and wrong together."""

import re

import pytest

from mpl_fast.config import RECIPES, AlgorithmConfig, RunConfig, problems
from mpl_fast.config.algorithms import MPLConfig, RolePlayConfig, SMPLConfig, UDAConfig
from mpl_fast.config.command_line import parse
from mpl_fast.config.fields import all_options
from mpl_fast.config.values import convert
from mpl_fast.errors import ConfigError
from tests.config.test_command_line import needed

HERE = ["--run-dir", "r", "--data.root", "d"]


def whole(text: str) -> str:
    """The text with the section's name before a dot at its beginning, or after a colon."""
    return re.sub(r"(^|:)\.", r"\1algorithm.", text)


RANGES = {  # options (of another recipe than mpl: its name and a colon before), refused values
    "at least 1": (
        "steps labeled_batch eval_batch log_every microbatches rollbacks data.prefetch "
        "data.shuffle_buffer",
        "0 -4",
    ),
    "at least 2": ("checkpoint_keep", "1"),
    "at least 8": ("data.image_size", "7"),
    "at least 0": (
        "epochs eval_every eval_epochs patience checkpoint_every spike_factor stop_at seed "
        "unlabeled_batch "
        "model.classes data.num_ops data.magnitude data.cutout data.final_cutout data.threads "
        ".feedback_ramp .consistency.weight .consistency.ramp .teacher.lr .teacher.weight_decay "
        ".teacher.max_grad_norm .teacher.warmup .teacher.delay_steps .teacher.gamma "
        "supervised:.mixup fixmatch:.weight mpl_roleplay:.swap_every "
        "mpl_roleplay:.student_delay_steps smpl:.feedback_ramp metasemi:.weight metasemi:.ramp "
        "metasemi:.mixup metasemi:.label_rate noisy_student:.weight",
        "-1",
    ),
    "at most 1024": ("data.threads", "1025 100000"),
    "at most 10000000000000": ("seed", "10000000000001 9223372036854775807"),
    "above 0": (
        ".consistency.temperature metasemi:.epsilon noisy_student:.temperature",
        "0 -1",
    ),
    "in [0, 1]": (
        "model.norm_momentum data.hw_decoder_load .label_threshold .consistency.threshold "
        "fixmatch:.threshold noisy_student:.threshold",
        "1.5 -0.5",
    ),
    "in (0, 1]": ("data.eval_crop", "0.0 1.5"),
    "in [0, 1)": (
        ".label_smoothing .baseline .held_out .student.momentum .student.ema .student.dropout "
        ".student.drop_path supervised:.label_smoothing finetune:.label_smoothing "
        "uda:.label_smoothing fixmatch:.label_smoothing smpl:.label_smoothing "
        "noisy_student:.label_smoothing",
        "1.0 -0.5",
    ),
}
CASES = [
    (option, value, words)
    for words, (options, values) in RANGES.items()
    for option in options.split()
    for value in values.split()
]


@pytest.mark.parametrize(("option", "value", "words"), CASES)
def test_a_value_out_of_range_is_refused(option: str, value: str, words: str) -> None:
    recipe, _, key = whole(option).rpartition(":")
    (kind,) = [
        o.kind for o in all_options(RunConfig(algorithm=RECIPES[recipe or "mpl"]())) if o.key == key
    ]
    message = re.escape(f"{key} must be {words}, not {convert(value, kind)}")
    with pytest.raises(ConfigError, match=f"^{message}$"):
        parse([*HERE, f"--recipe={recipe or 'mpl'}", *needed(recipe), f"--{key}={value}"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("std=[0.2,0,0.3]", "data.std must be above 0, not 0.0"),
        ("std=[0.2,-0.2,0.3]", "data.std must be above 0, not -0.2"),
        ("mean=[0.5,-0.5,0.5]", "data.mean must be at least 0, not -0.5"),
        (
            "mean=[123.675,116.28,103.53]",
            "data.mean must be on a scale of 0 to 1, not [123.675, 116.28, 103.53]: divide by 255",
        ),
        (
            "std=[58.395, 57.12, 57.375]",
            "data.std must be on a scale of 0 to 1, not [58.395, 57.12, 57.375]: divide by 255",
        ),
        ("std=[.nan,1,1]", "data.std must be a list such as [1,2,3], not [.nan,1,1]"),
        ("mean=[.inf,0,0]", "data.mean must be a list such as [1,2,3], not [.inf,0,0]"),
        ("mean=[nan,0,0]", "data.mean must be a list such as [1,2,3], not [nan,0,0]"),
        ("mean=[0,0,1e999]", "data.mean must be a list such as [1,2,3], not [0,0,1e999]"),
    ],
)
def test_each_number_of_a_list_is_checked(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        parse([*HERE, f"--data.{option}"])


def test_a_folder_that_dali_cannot_open_is_refused() -> None:
    message = "data.root a\udcff is not UTF-8, which DALI cannot open: rename the folder"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        parse([*HERE, "--data.root", "a\udcff"])


@pytest.mark.parametrize("option", ["mean=[0,0,0]", "mean=[1,1,1]", "std=[1,1,1]", "threads=1024"])
def test_the_ends_of_ranges_are_taken(option: str) -> None:
    parse([*HERE, f"--data.{option}"])


CONTRADICTIONS = """\
.feedback=exact .labels=argmax | .feedback exact needs labels soft (or auto), not argmax
.feedback=sampled .labels=soft | .feedback sampled needs labels sampled (or auto), not soft
.labels=soft | .feedback difference has no gradient
.labels=sampled | .labels sampled need feedback sampled, which uses the view they come from
.feedback=exact .student.optimizer=adamw | .student.optimizer must be sgd for feedback exact
recipe=mpl_roleplay .feedback=per_example .teacher.optimizer=adamw | .teacher.optimizer must be sgd
recipe=smpl .feedback=exact .learner.optimizer=adamw | .learner.optimizer must be sgd for feedback
recipe=mpl_roleplay .feedback=parity_kekmodel | .feedback parity_kekmodel is for recipe mpl
.feedback=parity_google .bn-batches=split | .bn_batches cannot be chosen with feedback parity_google
.feedback=parity_kekmodel .consistency.measure=cosine | .consistency.measure cannot be chosen with
.feedback=exact .baseline=0.9 | .baseline cannot be subtracted from feedback exact
.feedback=off .held-out=0.5 | .held_out is for the feedback, which is off
cuda-graphs=model compile=off | cuda_graphs model is for compiled networks: give --compile
cuda-graphs=step .feedback=exact | cuda_graphs step is not possible, since feedback exact draws
cuda-graphs=step .teacher-graph=recompute | cuda_graphs step is not possible, since teacher_graph re
cuda-graphs=step recipe=metasemi | cuda_graphs step is not possible, since recipe metasemi
cuda-graphs=step grad-sync=ddp | cuda_graphs step is not possible, since the buckets
cuda-graphs=step .student.optimizer-backend=apex | cuda_graphs step is not possible, since
.teacher.optimizer-backend=apex .teacher.optimizer=adamw | .teacher.optimizer_backend apex is for
model.norm=sync grad-sync=ddp compile=default | model.norm sync cannot be compiled with grad_sync
microbatches=2 grad-sync=ddp | microbatches above 1 need grad_sync allreduce
recipe=smpl microbatches=2 | microbatches must be 1 for recipe smpl, whose step needs the whole
.feedback=parity_google microbatches=2 | microbatches must be 1 for feedback parity_google
patience=3 eval-every=0 | patience needs evaluations before the end: set eval_every
on-spike=rollback checkpoint-every=0 | on_spike rollback needs checkpoints before the end: set
recipe=finetune | .start is missing: give --algorithm.start RUN_DIR
recipe=finetune .start=s model.pretrained=timm | model.pretrained is not for recipe finetune, which
model.frozen=true | model.frozen would keep random weights: give --model.pretrained
model.frozen=true model.pretrained=f .student.trunk_delay_steps=5 | .student.trunk_delay_steps is of
.teacher.momentum=0 | .teacher.momentum must be above 0
.teacher.milestones=[100] | .teacher.milestones must be empty for schedule cosine, not (100,)
.student.schedule=step | .student.milestones must be the rising steps of schedule step, not ()
.student.schedule=step .student.milestones=[9,5] | .student.milestones must be the rising steps of
recipe=fixmatch unlabeled-batch=0 | unlabeled_batch must be at least 1 for recipe fixmatch, not 0
"""


@pytest.mark.parametrize("line", CONTRADICTIONS.splitlines())
def test_a_contradiction_is_refused(line: str) -> None:
    options, message = line.split(" | ")
    given = [f"--{whole(option)}" for option in options.split()]
    with pytest.raises(ConfigError, match=re.escape(whole(message))) as caught:
        parse([*HERE, *given])
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
        (UDAConfig(), None, None),
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
