#!/bin/bash
# sbatch configs/run/slurm.sh configs/semi_supervised/fixmatch_fashion_mnist.yaml
# Lightning reads nodes, ranks and devices from SLURM; a job that is requeued resumes from its last checkpoint.
#SBATCH --job-name=zoo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=SIGUSR1@90
#SBATCH --requeue

srun uv run --no-sync zoo fit -c "$1" -c configs/run/multi_node.yaml
