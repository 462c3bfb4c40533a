#!/usr/bin/env bash
# The frontier of a fine-tuned MiniLM on SST-2, and a student of half its layers: docs/compressing.md.
#
#     LLMKIT_DATA=FOLDER docs/studies/compress/sst2.sh RUN OUTPUT
#
# RUN is the folder of a run of configs/classification/sst2_bert.yaml, runs/sst2_bert/version_0. About 8 minutes on one core.
set -euo pipefail
run=$1 output=$2
export OMP_NUM_THREADS=1
llmkit compress "$run" --to drop_layers3 --calibration 128 --rounds 2 --no_memory --output "$output/half"
llmkit fit --config "$run/config.yaml" --model.init_from "$output/half/drop_layers3.ckpt" \
  --model.distill "{teacher: $run/checkpoints/best.ckpt, temperature: 2, weight: 0.5}" \
  --trainer.max_epochs 1 --output "$output/runs" --name student
llmkit compress "$run" --more "student=$output/runs/student" --calibration 64 --rounds 3 --no_memory --output "$output/frontier" \
  --to int8,int4,gptq,bf16,dynamic_int8,int8+bf16,prune50,wanda50,svd50,whitened_svd50,whitened_svd50+int8,drop_layers1,\
drop_heads25,drop_channels25+gptq
