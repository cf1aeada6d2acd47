#!/bin/bash
# 2 nodes x 8 GPUs: sbatch configs/llama/slurm.sh -c OVERLAY.yaml ... --KEY VALUE ... (what follows goes to fit)
# Two minutes before its time is up, or when it is preempted, the job saves, is queued again and resumes.
#SBATCH --job-name=stableqat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

run=$SLURM_JOB_NAME-$SLURM_JOB_ID # stays the same when the job is queued again
folder=lightning_logs/llama/$run resume=
for checkpoint in "$folder"/checkpoints/{last,previous}.ckpt; do
    [ -e "$checkpoint" ] && resume="--ckpt_path last"
done
if [ -z "$resume" ] && [ -e "$folder" ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
    mv "$folder" "$folder.restart$SLURM_RESTART_COUNT" # requeued before its first checkpoint
fi

trap : USR1 TERM # srun passes them on to its tasks
srun --kill-on-bad-exit=1 stableqat fit -c llama/base -c llama/fsdp "$@" \
    --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
    --trainer.logger.save_dir lightning_logs --trainer.logger.name llama --trainer.logger.version "$run" $resume
code=$?
[ $code -eq 143 ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
