"""Writes a trained network for other programs: export.py RUN --out DIR/model.safetensors"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpl_fast.errors import run_command

DESCRIPTION = """Writes the network that a run evaluates, with averaged weights, for programs
without mpl_fast. The suffix of --out is the format: .safetensors has weights, which
timm.create_model("local-dir:DIR", pretrained=True) loads, if the network is one of timm's; .pt2 and
.onnx have the whole network, for torch.export.load and onnxruntime, and any number of images in a
batch. Inputs are normalized float32 images, outputs are logits. config.json (class names, size,
normalization) and README.md (a model card) are written beside it, as the Hugging Face hub expects.
The file is read again and its logits are compared before it gets its name. Options of train.py
(--data.root REC) override those of RUN/config.yaml."""


def main() -> None:
    """The files, the check, and the command that publishes them."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=DESCRIPTION)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument(
        "--out", required=True, type=Path, help="DIR/model.safetensors, DIR/NAME.pt2 or .onnx"
    )
    parser.add_argument(
        "--checkpoint", choices=("newest", "best"), default="newest", help="which one (newest)"
    )
    parser.add_argument("--force", action="store_true", help="replace files of an earlier export")
    own, options = parser.parse_known_args()
    from mpl_fast.inference.export import check_out, export
    from mpl_fast.inference.trained import load

    check_out(own.out, force=own.force)
    trained = load(own.run, device="cpu", checkpoint=own.checkpoint, pipeline=options)
    exported = export(trained, own.out, force=own.force)
    for note in [*trained.warnings, *exported.notes]:
        print(f"note: {note}", file=sys.stderr)
    print(f"{trained.checkpoint}: {trained.config.model.name}, {len(trained.classes)} classes")
    print(*exported.files, sep="\n")
    if exported.difference is None:
        print("not checked, since onnxruntime is missing: pip install 'mpl_fast[export]'")
    else:
        share = f"{exported.difference:.1e}"
        print(f"read again: logits of random images differ by {share} of the largest, at most")
    folder = shlex.quote(str(own.out.parent))
    print(f"to publish, choose a license in README.md: hf upload USER/NAME {folder}")


if __name__ == "__main__":
    run_command("export", main)
