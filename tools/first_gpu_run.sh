#!/usr/bin/env bash
# The first minutes on a GPU: tests that need one, benchmarks, and a training run, in --minutes.
#
#   tools/first_gpu_run.sh --minutes 13 --out OUT --cifar cifar10-jpeg.tar.xz [--archive FILE.tar.gz]
#   tools/first_gpu_run.sh --help
#
# OUT gets a log and JSON of every step, summary.md and summary.json, all of them after each step. The
# same command goes on where an earlier one ended, also on another machine with a copy of OUT (FILE
# is one, without images and checkpoints): steps that have passed are not run again. --only and --skip
# choose steps, such as --only test_ or --skip test_.
#
# Needs Linux, one GPU (A100, H100 or H200), a C compiler, and of Python packages, beside torch >= 2.11
# with CUDA, triton and pytest:
#   nvidia-dali-cuda130 (or -cuda120) >= 2.4, numpy, tensorboardX, timm, PyYAML, simplejpeg,
#   opencv-python-headless or opencv-python, hypothesis, scipy, scikit-learn, Pillow
# `bench input` needs torchvision, too; without liger-kernel and spdl their rows are left out.
#
# Without a package registry there, WHEELS=FOLDER names one that holds the missing packages' wheels, or
# the parts (part00, part01, ...) of a tar of them; they are installed into FOLDER/site. PYTHON=python3.12
# chooses the interpreter; after `make venv` it is PYTHON=.venv/bin/python.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
if [[ -n ${WHEELS:-} ]]; then
  if [[ ! -d $WHEELS/site ]]; then
    if compgen -G "$WHEELS/part*" >/dev/null; then cat "$WHEELS"/part* | tar x -C "$WHEELS"; fi
    if ! compgen -G "$WHEELS/*.whl" >/dev/null; then
      echo "first_gpu_run: error: WHEELS=$WHEELS has neither *.whl nor part00, part01, ..." >&2
      exit 2
    fi
    rm -rf "$WHEELS/site.tmp"
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
      --target "$WHEELS/site.tmp" "$WHEELS"/*.whl
    mv "$WHEELS/site.tmp" "$WHEELS/site"
  fi
  PYTHONPATH=$(cd "$WHEELS/site" && pwd)${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "$python" "$root/tools/first_gpu" "$@" # by its path: -m would look in the present folder first
