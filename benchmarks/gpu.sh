#!/usr/bin/env bash
# The part of the work that needs a CUDA device, in one go:
#
#     bash benchmarks/gpu.sh [CHECKOUT OF github.com/RajGhugare19/alm]
#
# Runs the gpu-marked tests, then `python -m benchmarks` while the device does nothing
# else, and starts the paper's HalfCheetah-v5 run to 200,000 training steps, which goes
# on in the background. A part that fails does not keep the next from running; the exit
# status says so at the end. Needs the extras cli and test. Results are in results/gpu.
set -euo pipefail
authors=()
if [ $# -gt 0 ]; then authors=(--authors "$(realpath "$1")"); fi
cd "$(dirname "$0")/.."
folder=results/gpu
mkdir -p "$folder"
failed=0

python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "benchmarks/gpu.sh: PyTorch finds no CUDA device" >&2; exit 1; }
nvidia-smi > "$folder/nvidia-smi.txt"

python -m pytest -m gpu -ra tests 2>&1 | tee "$folder/tests.txt" || failed=1

python -m benchmarks --task HalfCheetah-v5 Humanoid-v5 --preset paper --device cuda \
    "${authors[@]}" --repeats 50 --loop-steps 40 \
    --json "$folder/bench.json" --plot "$folder/growth.png" 2>&1 |
    tee "$folder/bench.txt" || failed=1

# The peers again, next to the captured graph instead of the eager update.
python -m benchmarks --task HalfCheetah-v5 Humanoid-v5 --preset paper --device cuda \
    --sections peers --modes graph --repeats 50 --json "$folder/bench-graph.json" 2>&1 |
    tee "$folder/bench-graph.txt" || failed=1

nohup alm-torchrl train HalfCheetah-v5 --preset paper --device cuda --seed 0 \
    --total-steps 200000 --run-dir "$folder/HalfCheetah-v5-paper-s0" \
    > "$folder/train.txt" 2>&1 &
echo "Training in the background (process $!): tail -f $folder/train.txt"
echo "A run that was stopped continues with the same command."
exit "$failed"
