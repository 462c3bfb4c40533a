#!/usr/bin/env bash
# Frontiers of three small models of characters, each compressed in several ways: docs/compressing.md.
#
#     LLMKIT_DATA=FOLDER docs/studies/compress/run.sh OUTPUT [METHODS]
#
# About 15 minutes on one core. The tables are OUTPUT/MIXER/frontier.csv.
set -euo pipefail
output=$1
methods=${2:-int8,int4,gptq,bf16,dynamic_int8,int8+bf16,prune50,prune2:4,svd50,whitened_svd50,\
whitened_svd50+int8,drop_channels25}
export OMP_NUM_THREADS=1
for mixer in multi_head gru linear; do
  run=$output/runs/$mixer
  [ -d "$run" ] || llmkit fit --config configs/generation/tinyshakespeare.yaml --model.attention "$mixer" \
    --trainer.max_steps 400 --trainer.val_check_interval 400 --trainer.limit_val_batches 50 \
    --output "$output/runs" --name "$mixer"
  llmkit compress "$run" --to "$methods" --output "$output/$mixer" --no_memory
done
