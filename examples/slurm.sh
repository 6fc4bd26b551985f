#!/usr/bin/env bash
# Training on the nodes of a Slurm job, which goes on by itself when its time is over (docs/clusters.md):
#
#     sbatch --nodes 2 examples/slurm.sh accelerate_configs/hsdp_ep.yaml runs/mine examples/train.py --model MODEL
#
# In order: the YAML, the folder of checkpoints, the script and its arguments. The script gets `--output FOLDER`, and
# `--resume` once there is a checkpoint. The YAML says how many nodes and processes there are.
#
#SBATCH --ntasks-per-node=1       # accelerate starts a node's ranks
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300       # to this script, 300 seconds before the end
#SBATCH --requeue
#SBATCH --open-mode=append        # a job that goes on keeps its log

set -u
if [ $# -lt 3 ] || [ ! -f "$1" ]; then
  echo "error: expected a YAML that exists, a folder and a script, and found: $*" >&2
  exit 2
fi
yaml=$1 output=$2
shift 2
nodes=$(sed -n "s/^num_machines: *[\"']*\([0-9]*\).*/\1/p" "$yaml")
if [ "${nodes:-1}" != "$SLURM_NNODES" ]; then
  echo "error: $yaml has num_machines: ${nodes:-1}, and the job has $SLURM_NNODES nodes. Change one of them." >&2
  exit 2
fi
set -- "$@" --output "$output"
if compgen -G "$output/checkpoint-*" > /dev/null; then
  set -- "$@" --resume
fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300  # torch's launcher kills ranks that save for longer; 30 if it is not set
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((10000 + SLURM_JOB_ID % 50000))

requeue=no
save_and_end() {  # SIGTERM to the ranks: they finish the step, save and end
  requeue=yes
  scancel --signal=TERM "$SLURM_JOB_ID"
}
trap save_and_end USR1

srun bash -c 'exec accelerate launch --config_file "$0" --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$1" --main_process_port "$2" "${@:3}"' "$yaml" "$address" "$port" "$@" &
wait $!
status=$?
while kill -0 $! 2> /dev/null; do  # a signal ends `wait`, not the ranks
  wait $!
  status=$?
done
if [ $requeue = yes ]; then
  if ! scontrol requeue "$SLURM_JOB_ID"; then
    echo "error: Slurm did not requeue the job. Submit it again: it goes on from its last checkpoint." >&2
    exit 1
  fi
  exit 0  # torch's launcher has an error status when it was signalled
fi
exit $status
