#!/bin/bash
# An array job over one folder of concepts: each task trains its share of the jobs with one GPU, and no Ray is needed.
# A task that is preempted saves, is queued again and goes on; `sbatch examples/cluster/slurm_array.sh` again does only
# what is missing.
#SBATCH --job-name=dvar
#SBATCH --array=0-7
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail

CONCEPTS=${CONCEPTS:-/shared/concepts} # a folder of images for each concept, with NAME.json beside it
RUNS=${RUNS:-/shared/runs}
SHARE=$(mktemp -d)

# Every eighth concept, from the number of this task on.
mapfile -t folders < <(find "$CONCEPTS" -mindepth 1 -maxdepth 1 -type d | sort)
for ((index = SLURM_ARRAY_TASK_ID; index < ${#folders[@]}; index += SLURM_ARRAY_TASK_COUNT)); do
    ln -s "${folders[index]}" "${folders[index]}.json" "$SHARE/"
done

# The exec lets the signal reach dvar, which asks its run to save.
exec dvar batch "$SHARE" --output_dir "$RUNS/share-$SLURM_ARRAY_TASK_ID" --threads 8 --config settings.toml
