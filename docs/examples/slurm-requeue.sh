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

# SLURM signals this script; the training processes are told to save and stop, the launcher is left alone
stop() { pkill -USR1 -f -- '-u -m latent_ae train'; }
trap stop USR1 TERM

accelerate launch --num_processes 8 -m latent_ae train sd-vae data.source=/data/photos output_dir="$RUN" &
wait $!   # returns as soon as the signal comes
wait      # and this when the run has saved

# a finished run has results.json; anything else goes on where its newest checkpoint is
[ -f "$RUN/results.json" ] || scontrol requeue "$SLURM_JOB_ID"
