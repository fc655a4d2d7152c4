#!/bin/bash
# One node with eight GPUs; five minutes before the time limit the run saves and the job goes back into the queue.
#SBATCH --job-name=first-stage
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

RUN=$SCRATCH/runs/first-stage

newest() { ls -d "$RUN"/checkpoints/step-* "$RUN"/phases/*/checkpoints/step-* 2>/dev/null | grep -E '/step-[0-9]+$' | sort -V | tail -n 1; }
before=$(newest)

accelerate launch --multi_gpu --num_processes 8 -m latent_ae train sd-vae data.source=/data/photos output_dir="$RUN" &
launcher=$!

# SLURM signals this script; this job's training processes are told to save and stop, the launcher is left alone
stop() { pkill -USR1 -P "$launcher" -f -- '-m latent_ae train'; }
trap stop USR1 TERM
wait "$launcher"   # returns as soon as the signal comes
wait "$launcher"   # and this when the run has saved

# a finished run has results.json; one that got no further has met what another try would meet again
if [ -f "$RUN/results.json" ]; then
    echo "finished"
elif [ "$(newest)" = "$before" ]; then
    echo "no new checkpoint: not requeued. The reason is in the lines above; mend it and submit the job again" >&2
    exit 1
else
    scontrol requeue "$SLURM_JOB_ID"
fi
