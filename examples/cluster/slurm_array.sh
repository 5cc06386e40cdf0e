#!/bin/bash
# An array job over one folder of concepts: each task trains its share of the jobs with one GPU, and no Ray is needed.
# A task saves two minutes before its time limit, and one that is preempted is queued again. `sbatch
# examples/cluster/slurm_array.sh` again, with more concepts or the same, does only what is missing.
#SBATCH --job-name=dvar
#SBATCH --array=0-7
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
set -euo pipefail

SHARES=8                               # as many as --array has tasks; another number would train concepts again
CONCEPTS=${CONCEPTS:-/shared/concepts} # a folder of images for each concept, with NAME.json beside it
RUNS=${RUNS:-/shared/runs}
SHARE=$(mktemp -d)

if ((SLURM_ARRAY_TASK_ID >= SHARES)); then
    echo "--array must be within 0-$((SHARES - 1)), got $SLURM_ARRAY_TASK_ID: change it" >&2
    exit 2
fi

# The share of a concept follows from its name, so that it stays where it is when others are added.
for folder in "$CONCEPTS"/*/; do
    folder=${folder%/} name=$(basename "$folder")
    sum=$(printf %s "$name" | cksum)
    if ((${sum%% *} % SHARES == SLURM_ARRAY_TASK_ID)); then
        ln -s "$folder" "$folder.json" "$SHARE/"
    fi
done
if [ -z "$(ls "$SHARE")" ]; then
    echo "share $SLURM_ARRAY_TASK_ID has no concept"
    exit
fi

# B: sends the signal to this shell, and the exec lets it reach dvar, which asks its run to save.
exec dvar batch "$SHARE" --output_dir "$RUNS/share-$SLURM_ARRAY_TASK_ID" --threads 8 --config settings.toml
