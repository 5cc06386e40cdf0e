#!/bin/bash
# A Ray cluster on four nodes of SLURM, with one GPU for each run: the head starts first, the others join it, and the
# command runs on the head. `sbatch examples/cluster/slurm_ray.sh` again does only what is missing.
#SBATCH --job-name=dvar-ray
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
set -euo pipefail

export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(openssl rand -hex 32)
export RAY_AUTH_TOKEN

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address="${nodes[0]}:6379"
resources=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$SLURM_GPUS_PER_NODE")

srun --nodes=1 --ntasks=1 --overlap -w "${nodes[0]}" \
    ray start --head --port=6379 --block "${resources[@]}" &
until ray status --address "$address" > /dev/null 2>&1; do sleep 2; done
for node in "${nodes[@]:1}"; do
    srun --nodes=1 --ntasks=1 --overlap -w "$node" ray start --address="$address" --block "${resources[@]}" &
done

srun --nodes=1 --ntasks=1 --overlap -w "${nodes[0]}" \
    dvar batch jobs.toml --ray "$address" --workers $((SLURM_NNODES * SLURM_GPUS_PER_NODE)) \
    --gpus_per_worker 1 --threads 8 --output_dir /shared/runs
