"""The data position in checkpoints: DALI's state of each pipeline, and what it is valid for."""

import json
from collections.abc import Mapping

from mpl_fast.config import DataConfig
from mpl_fast.config.aliases import current_options
from mpl_fast.data.manifest import Manifest
from mpl_fast.data.operations import OPERATIONS, signature
from mpl_fast.errors import CheckpointError
from mpl_fast.untrusted import json_value

Identity = Mapping[str, str | int | float]
GRAPH = 2  # increase it when a DALI graph changes: positions saved before are then refused
MADE_WITH = "made_with"
CODE = ("graph", "operations")  # keys that a version of the code decides, not a setting
SETTINGS = (
    "image_size", "crop", "strong_crop", "labeled_view", "interpolation", "antialias",
    "use_fast_idct", "flip", "policy", "num_ops", "magnitude", "translate",
    "cutout", "final_cutout", "shuffle_buffer",
)  # fmt: skip
# Keys of the ranks that a position is for: on another number of ranks it cannot be continued.
RANKS = ("rank", "world", "labeled", "unlabeled", "began")
# What positions that lack a key were saved with.
EARLIER: Identity = {
    "data.interpolation": "bicubic", "data.antialias": True, "data.use_fast_idct": False,
    "operations": "2d1c266d8ed08b87", "began": 0,
    "data.strong_crop": "shared", "data.labeled_view": "weak",
}  # fmt: skip


def identity_of(
    config: DataConfig, manifest: Manifest, gpu: int | None
) -> dict[str, str | int | float]:
    """Everything that shapes records, graph and draws. DALI itself restores a state into a pipeline
    with other settings without an error."""
    return {
        "data": manifest.content[:16],
        "graph": GRAPH,
        "operations": signature(OPERATIONS) if config.policy != "dali" else EARLIER["operations"],
        "data.device": "cpu" if gpu is None else "gpu",
        **{f"data.{name}": getattr(config, name) for name in SETTINGS},
    }


def save_position(identity: Identity, states: Mapping[str, bytes]) -> dict[str, str | bytes]:
    """The position of streams with these DALI states."""
    return {MADE_WITH: json.dumps(identity, sort_keys=True), **states}


def damaged(reason: object) -> CheckpointError:
    """For a position that no version of this program has written."""
    return CheckpointError(
        f"the data position in the checkpoint is damaged ({reason}): start a new run"
    )


def stream_states(position: Mapping[str, str | bytes], identity: Identity) -> dict[str, bytes]:
    """The DALI states of a position. Raises CheckpointError unless it has this identity."""
    _check_same(_made_with(position), identity)
    return {name: value for name, value in position.items() if isinstance(value, bytes)}


def check_other_ranks(position: Mapping[str, str | bytes], identity: Identity) -> None:
    """Raises CheckpointError unless a position differs from this identity in its ranks alone."""
    _check_same(_made_with(position), identity, other_ranks=True)


def began_of(position: Mapping[str, str | bytes]) -> int:
    """The steps that were done when the order of a position began."""
    return int(_made_with(position)["began"])


def _made_with(position: Mapping[str, str | bytes]) -> dict[str, str | int | float]:
    try:
        return {**EARLIER, **current_options(json_value(position[MADE_WITH]))}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(error) from None


def _check_same(before: Identity, identity: Identity, *, other_ranks: bool = False) -> None:
    if before.get("data") != identity["data"]:
        raise CheckpointError(
            "the records in data.root are others than the checkpoint's: "
            "resume with the same records or start a new run"
        )
    keys = sorted({*identity, *before} - {*(RANKS if other_ranks else ())})
    differing = [key for key in keys if before.get(key) != identity.get(key)]
    # A change between policy dali and another one may change `operations` too: name the policy.
    settings = [key for key in differing if key not in CODE]
    if "graph" in differing or (differing and not settings):
        raise CheckpointError(
            "the data position was saved by another version of the input pipeline: "
            "finish the run with that version or start a new run"
        )
    if settings:
        key = settings[0]
        raise CheckpointError(
            f"the data position was saved with {key}={before.get(key)}, this run has "
            f"{key}={identity.get(key)}: resume with the same settings or start a new run"
        )
