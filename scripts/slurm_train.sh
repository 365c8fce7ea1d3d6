#!/bin/bash
# Train on several nodes under SLURM: one torchrun on each node, one process for each GPU.
#
#   sbatch --nodes 2 --gpus-per-node 4 scripts/slurm_train.sh --config best \
#     --data.shards /shared/shards --train.runs /shared/runs --name big
#
# The arguments go to trainer/train.py, with --resume added when SLURM has requeued the job.
# --train.runs and --data.shards must be on a disk that all nodes share; the shards may also be at a
# URL. Submit from the project's folder. Environment variables:
#
#   PYTHON           the interpreter of the environment; default: python
#   GPUS             processes on each node; default: the GPUs that SLURM gave, or 1
#   PORT             port of the rendezvous on the first node; default: from the job's number
#   SHARDPREP_CACHE  folder on a disk of the node for shards at URLs; default: a folder of this job
#                    in $TMPDIR (/tmp), which is removed at the end
#   SHARDPREP_CACHE_GB  largest size of that folder
#
# SLURM sends SIGUSR1 five minutes before the time limit, and SIGTERM on preemption. This script then
# sends SIGTERM to each torchrun: the run saves and ends, and the job is requeued. Processes with
# GPUs agree on this at steps that are multiples of --train.log_steps. The time between two such steps
# must not be longer than torchrun waits: 30 s, or TORCH_ELASTIC_SHUTDOWN_TIMEOUT if its release has
# that variable.
#
#SBATCH --job-name=shardprep-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -euo pipefail

python=${PYTHON:-python}
gpus=${GPUS:-${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}}
# SLURM may write a kind before the number, as in a100:4.
gpus=${gpus##*:}
nodes=${SLURM_JOB_NUM_NODES:?is set by sbatch; start this script with it}
port=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${hosts%%$'\n'*}
script=${SLURM_SUBMIT_DIR:-.}/trainer/train.py

arguments=("$@")
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
  # A run that was stopped before its first checkpoint cannot be resumed.
  settings=$("$python" "$script" --print-config "$@")
  run=$(printf '%s\n' "$settings" | "$python" -c '
import sys, yaml
config = yaml.safe_load(sys.stdin)
print(config["train"]["runs"], config["name"], sep="/")')
  if compgen -G "$run/checkpoints/step-*.pt" >/dev/null; then
    arguments+=(--resume)
  fi
fi

own_cache=
if [ -z "${SHARDPREP_CACHE:-}" ]; then
  own_cache=${TMPDIR:-/tmp}/shardprep-$SLURM_JOB_ID
  export SHARDPREP_CACHE=$own_cache
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Without this variable, a node that joins again does not learn from torchrun where the others are.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

# srun passes the signal on to every torchrun.
asked='' steps=''
trap 'asked=SIGUSR1; kill -TERM "$steps" || true' USR1
trap 'asked=SIGTERM; kill -TERM "$steps" || true' TERM

srun --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \
  "$python" -m torch.distributed.run \
  --nnodes "$nodes" --nproc-per-node "$gpus" --max-restarts 3 \
  --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-backend c10d \
  --rdzv-endpoint "$first:$port" \
  "$script" ${arguments[@]+"${arguments[@]}"} &
steps=$!

# A signal ends `wait` at once, but the processes end only when they have saved.
while
  code=0
  wait "$steps" || code=$?
  kill -0 "$steps" 2>/dev/null
do :; done
if [ -n "$asked" ] && [ "$code" -gt 128 ]; then
  code=0
  wait "$steps" || code=$?
fi

if [ -n "$own_cache" ]; then
  srun --ntasks="$nodes" --ntasks-per-node=1 rm -rf "$own_cache" || true
fi
if [ -n "$asked" ] && [ "$code" -ne 0 ]; then
  echo "slurm_train: $asked, requeued" >&2
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
