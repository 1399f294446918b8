"""What lies beside an exported network: config.json as timm and the Hugging Face hub read it, and
README.md, the model card."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mpl_fast
from mpl_fast import models
from mpl_fast.config import DataConfig, FinetuneConfig, NoisyStudentConfig, RunConfig
from mpl_fast.config.command_line import as_yaml
from mpl_fast.config.run import CHECKPOINTS
from mpl_fast.data.manifest import Manifest
from mpl_fast.first_few import counted
from mpl_fast.inference.trained import Trained, resized_side
from mpl_fast.training.evaluate import accuracy_line
from mpl_fast.untrusted import json_object

TAG = "mpl_fast"  # in a card: it was written here
TASK = "image-classification"
NOT_ANTIALIASED = (
    "The images were resized without antialiasing, in training and evaluation; timm's transform "
    "antialiases."
)


def hub_config(trained: Trained, manifest: Manifest | None) -> str:
    """The text of config.json: architecture, class names, and how images are resized, cropped and
    normalized. `manifest`: of the run's records, which have the titles of classes."""
    name, data, classes = trained.config.model.name, trained.config.data, len(trained.classes)
    published = getattr(trained.network, "pretrained_cfg", {})  # of timm's networks
    side, whole = data.image_size, data.crop == "pad_crop"
    # timm rounds size / crop_pct down: four decimals, rounded down, give exactly this side.
    share = 1.0 if whole else math.floor(1e4 * side / resized_side(data)) / 1e4
    images = {
        "input_size": [3, side, side],
        "interpolation": data.interpolation,
        "crop_pct": share,
        "crop_mode": "squash" if whole else "center",
        "mean": [*data.mean],
        "std": [*data.std],
    }
    kept = ("fixed_input_size", "first_conv", "classifier")
    about: dict[str, Any] = {
        "architecture": name.partition(".")[0],
        "num_classes": classes,
        "label_names": [*trained.classes],
    }
    if manifest and any(manifest.titles):
        named = zip(trained.classes, manifest.titles, strict=True)
        about["label_descriptions"] = {one: title or one for one, title in named}
    if models.in_timm(name):
        about["model_args"] = models.size_option(name, side)
    about["pretrained_cfg"] = {
        "num_classes": classes,
        **images,
        **{key: published[key] for key in kept if key in published},
    }
    about[TAG] = {
        "version": mpl_fast.__version__,
        "recipe": trained.config.recipe,
        "step": trained.step,
    }
    return json.dumps(about, indent=1) + "\n"


def card(trained: Trained, manifest: Manifest | None, files: Sequence[str]) -> str:
    """The text of README.md; `files` are the names of the network's files in the folder."""
    title = f"{trained.config.model.name} by {trained.config.recipe}"
    timm = models.in_timm(trained.config.model.name) and any(map(_has_weights, files))
    about = (
        f"A network for images of {len(trained.classes)} classes, whose names are `label_names` "
    )
    about += "in `config.json`. It returns logits."
    parts = [
        f"---\n{_front_matter(trained, title, 'timm' if timm else 'pytorch')}\n---",
        f"# {title}",
        about,
        "## Accuracy",
        _accuracy(trained),
        "## Use",
        *_use(trained, files),
        *([] if trained.config.data.antialias else [NOT_ANTIALIASED]),
        "## Training",
        *_training(trained, manifest),
    ]
    return "\n\n".join(parts) + "\n"


def _has_weights(file: str) -> bool:
    return file.endswith(".safetensors")


def _front_matter(trained: Trained, title: str, library: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # comes with timm

    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=_data_name(trained.config),
            dataset_name=_data_name(trained.config),
            metric_type="accuracy",
            metric_name=shown,
            metric_value=round(trained.accuracy[key], 2),
        )
        for key, shown in (("top1", "top-1"), ("top5", "top-5"))
        if key in trained.accuracy
    ]
    data = ModelCardData(
        library_name=library,
        pipeline_tag=TASK,
        tags=[TASK, library, TAG],
        model_name=title,
        eval_results=results or None,
    )
    return f"# license: choose one\n{data.to_yaml()}"


def _data_name(config: RunConfig) -> str:
    return Path(config.data.root).name or "unknown"


def _accuracy(trained: Trained) -> str:
    if not trained.accuracy:
        return "Not evaluated."
    best = trained.checkpoint.parent.name == CHECKPOINTS["best"]
    chosen = ", by which this checkpoint was chosen" if best else ""
    return (
        f"{accuracy_line(trained.accuracy).capitalize()}: the validation split of "
        f"{_data_name(trained.config)}{chosen}, after {trained.step} training steps."
    )


def _use(trained: Trained, files: Sequence[str]) -> list[str]:
    """A heading and a piece of Python for each file."""
    name, classes = trained.config.model.name, len(trained.classes)
    parts = []
    for file in files:
        if _has_weights(file) and models.in_timm(name):
            code = TIMM
        elif _has_weights(file):
            code = _images(trained.config.data) + OWN.format(file=file, name=name, classes=classes)
        else:
            code = _images(trained.config.data) + (PT2 if file.endswith(".pt2") else ONNX).format(
                file=file
            )
        parts.append(f"`{file}`:\n\n```python\n{code}```")
    return parts


TIMM = """import timm
from PIL import Image

network = timm.create_model("local-dir:.", pretrained=True).eval()  # on the hub: hf-hub:USER/NAME
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
images = transform(Image.open("image.jpg").convert("RGB"))[None]
label = network(images).argmax().item()
print(network.pretrained_cfg["label_names"][label])
"""

OWN = """import torch
from mpl_fast import models
from safetensors.torch import load_file

network = models.build("{name}", {classes}).eval()
network.load_state_dict(load_file({file!r}))
label = network(torch.from_numpy(images)).argmax().item()
"""

PT2 = """import json
import torch

about = {{"config.json": ""}}
network = torch.export.load({file!r}, extra_files=about).module()
label = network(torch.from_numpy(images)).argmax().item()
print(json.loads(about["config.json"])["label_names"][label])
"""

ONNX = """import json
import onnxruntime

session = onnxruntime.InferenceSession({file!r})
label = session.run(None, {{"images": images}})[0].argmax()
about = json.loads(session.get_modelmeta().custom_metadata_map["config.json"])
print(about["label_names"][label])
"""


def _images(data: DataConfig) -> str:
    """Python that makes the network's input of an image as evaluation does.

    Without `antialias`, Pillow's bicubic filter has another coefficient (-1) than DALI's (-0.5).
    """
    side, shorter = data.image_size, resized_side(data)
    size = f"({side}, {side})"
    crop = ""
    if data.crop == "random_resized":
        size = f"[{shorter} * length // min(image.size) for length in image.size]"
        crop = f"left, top = (round((length - {side}) / 2) for length in image.size)\n"
        crop += f"image = image.crop((left, top, left + {side}, top + {side}))\n"
    filter_ = f"Image.{data.interpolation.upper()}"
    resized = f"image = image.resize({size}, {filter_})"
    if not data.antialias:
        resized = f"size = {size}\n"
        resized += f"image = image.transform(size, Image.EXTENT, (0, 0, *image.size), {filter_})"
    return f"""import numpy as np
from PIL import Image

image = Image.open("image.jpg").convert("RGB")
{resized}
{crop}images = (np.asarray(image) / 255 - {[*data.mean]}) / {[*data.std]}
images = images.transpose(2, 0, 1)[None].astype(np.float32)  # (1, 3, {side}, {side})

"""


def _training(trained: Trained, manifest: Manifest | None) -> list[str]:
    facts = [f"recipe `{trained.config.recipe}` of mpl_fast {mpl_fast.__version__}"]
    if manifest:
        splits = manifest.splits.items()
        facts.append("images: " + ", ".join(f"{one.records} {name}" for name, one in splits))
    environment = json_object(Path(trained.config.run_dir) / "env.json")
    if versions := environment.get("versions"):
        facts.append("versions: " + ", ".join(f"{k} {v}" for k, v in versions.items() if v))
    if devices := environment.get("devices"):
        facts.append(f"{counted(environment.get('ranks', 1), 'rank')} on {', '.join(devices)}")
    if commit := environment.get("git_commit"):
        facts.append(f"git commit {commit}")
    return [
        "\n".join(f"- {fact}" for fact in facts),
        "The run is repeated by `python mpl_fast/train.py --config config.yaml --data.root REC "
        "--run-dir RUN` with this `config.yaml`:",
        f"```yaml\n{as_yaml(_without_folders(trained.config))}```",
    ]


def _without_folders(config: RunConfig) -> RunConfig:
    """A card is published: of paths on this machine only the last name is left, or nothing."""
    algorithm = config.algorithm
    if isinstance(algorithm, FinetuneConfig):
        algorithm = dataclasses.replace(algorithm, start=Path(algorithm.start).name)
    if isinstance(algorithm, NoisyStudentConfig):
        algorithm = dataclasses.replace(algorithm, teacher=Path(algorithm.teacher).name)
    return dataclasses.replace(
        config,
        run_dir="",
        data=dataclasses.replace(config.data, root=""),
        model=dataclasses.replace(config.model, pretrained=Path(config.model.pretrained).name),
        algorithm=algorithm,
    )
