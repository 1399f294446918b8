"""Where a command is now: the old commands are links to this file."""

import sys
from pathlib import Path

MOVED = {
    "ablation": "tools.studies.ablation",
    "bench_all": "tools.bench all",
    "bench_backbone": "tools.bench backbone",
    "bench_ckpt": "tools.bench checkpoint",
    "bench_data": "tools.bench input",
    "bench_kernels": "tools.bench losses",
    "bench_make_rec": "tools.bench pack",
    "bench_optim": "tools.bench optimizer",
    "bench_scaling": "tools.bench ranks",
    "bench_startup": "tools.bench startup",
    "bench_step": "tools.bench step",
    "bench_syncs": "tools.bench syncs",
    "compare": "tools.bench compare",
}

if __name__ == "__main__":
    name = Path(sys.argv[0]).stem
    new = f"python -m {MOVED[name]}" if name in MOVED else f"one of {', '.join(MOVED.values())}"
    print(f"tools/{name}.py is now: {new}", file=sys.stderr)
    raise SystemExit(2)
