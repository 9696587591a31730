#!/usr/bin/env bash
# Stands for a batch job of Slurm: submits it and stays until it ends, as systemd's unit does for a
# run without Slurm. Started anew, it takes to the job that it submitted before; ended by SIGTERM, it
# cancels the job.
#
#   slurm-job.sh train.sbatch [ARGUMENTS …]      RDZV_ID names the job, NNODES says how many hosts
set -u

name=gpu-training-$RDZV_ID

say() { printf 'slurm-job: %s\n' "$*" >&2; }

job=$(squeue --noheader --name="$name" --format=%A | head -n 1)
if [[ -z $job ]]; then
    job=$(sbatch --parsable --job-name="$name" --nodes="$NNODES" --exclusive --chdir="$PWD" \
        --output="$PWD/progress.log" --error="$PWD/errors.log" "$@") || exit 1
fi
say "the run is job $job of Slurm"
trap 'scancel "$job"; exit 143' TERM

unknown=0
# A minute without an answer: the controller may be starting again.
while ((unknown < 60)); do
    state=$(squeue --noheader --states=all --jobs="$job" --format=%T 2>/dev/null)
    case $state in
        COMPLETED) exit 0 ;;
        FAILED | CANCELLED | TIMEOUT | DEADLINE | OUT_OF_MEMORY | BOOT_FAIL)
            say "job $job ended: $state; scontrol show job $job"
            exit 1
            ;;
        '') unknown=$((unknown + 1)) ;;
        *) unknown=0 ;;  # it waits, runs, or was queued anew
    esac
    sleep 1
done
say "Slurm tells nothing of job $job any more; is slurmctld running?"
exit 1
