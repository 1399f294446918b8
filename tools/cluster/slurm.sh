#!/usr/bin/env bash
# Trains on 2 nodes of 8 GPUs: sbatch tools/cluster/slurm.sh, from the repository. docs/cluster.md explains it.
# Preempted, or short of time, the job saves a checkpoint, is queued again, and resumes. Give account,
# partition and the like to sbatch, and to this script the options of train.py: slurm.sh --seed 2
#SBATCH --job-name=mpl_fast
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
set -uo pipefail

# What a site changes, here or in the environment. RUN must lie on a file system that all nodes share.
: "${CONFIG:=configs/imagenet10_resnet50_mpl.yaml}"
: "${REC:=rec/imagenet10}"
: "${RUN:=runs/$SLURM_JOB_NAME-$SLURM_JOB_ID}"
: "${RANKS:=8}"                          # on a node, one a GPU
: "${TORCHRUN:=.venv/bin/torchrun}"
: "${MASTER_PORT:=$((20000 + SLURM_JOB_ID % 10000))}"
# Seconds that torchrun (not 2.11: 30) waits for workers to save; less than --signal and KillWait allow.
: "${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:=270}"
: "${NCCL_DEBUG:=WARN}"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT CONFIG REC RUN RANKS TORCHRUN TORCH_ELASTIC_SHUTDOWN_TIMEOUT NCCL_DEBUG

newest() { find "$RUN/checkpoints" -maxdepth 1 -name 'step_*' 2>/dev/null | sort | tail -n 1; }

stopped=
stop() { # to torchrun on all nodes, which forwards it; a TERM to srun itself would kill them
  stopped=yes
  scancel --signal=TERM "$SLURM_JOB_ID"
}

before=$(newest)
trap stop TERM
# --wait: when one node's torchrun has ended, the others' may take as long to notice it.
srun --wait=120 bash -c 'exec "$TORCHRUN" --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" \
  --nproc-per-node="$RANKS" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
  mpl_fast/train.py --config "$CONFIG" --data.root "$REC" --run-dir "$RUN" "$@"' torchrun "$@" &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a signal interrupts `wait`
wait "$step"
code=$?

# torchrun ends with 1 whatever the reason. A job that was stopped, or has come further, is queued again;
# one that fails without progress, as with a wrong option, is not, and neither is one that was canceled.
if ((code != 0)) && [[ -n $stopped || $(newest) != "$before" ]] &&
  [[ $(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T) == RUNNING ]]; then
  echo "slurm.sh: queued again; newest checkpoint: $(newest)"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
