#!/bin/bash
# Trains with Slurm on several nodes.
#
# Copy this file, edit the lines marked EDIT, and submit the copy from the folder that the
# config and the run folder are relative to, in the environment gptjax is installed in:
#
#   sbatch slurm.sh
#
# The run folder must be on a file system that all nodes share. Options of sbatch override
# the lines below, for example --partition=gpu --time=24:00:00.
#
# Two minutes before the time limit the run gets SIGTERM: it saves, exits with code 75, and
# the job is requeued. So is a job whose node fails.
#
#   scancel --signal=TERM JOBID   save and requeue
#   scancel JOBID                 end; `sbatch slurm.sh` resumes from the last checkpoint
#
#SBATCH --job-name=gptjax
# EDIT: nodes, and GPUs per node. JAX runs one process per GPU; for CPU nodes use one task
# per node and delete the line with GPUs.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

set -u

# EDIT: a built-in config or a TOML file, the run folder, further options.
train=(gptjax train gpt2_124m --run runs/gpt2_124m --distributed auto)

# Since version 22.05 Slurm no longer passes this on to srun.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
  export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
fi

# The first task to exit must not kill the others, which may still be saving. If a task
# fails, the others exit by themselves.
srun --kill-on-bad-exit=0 --wait=600 "${train[@]}"
code=$?

# TERM is not trapped: scancel then ends this script before it requeues.
if [ "$code" -eq 75 ]; then
  echo "interrupted, all progress is saved: requeueing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
