#!/usr/bin/env bash
# Scores of heads over the steps of one run: a decoder of two layers learns multi-query recall.
# Writes docs/studies/explain/heads.{json,csv,png}. Takes some two minutes of one core.
set -e
cd "$(dirname "$0")/../../.."
runs=$(mktemp -d)
llmkit fit --config configs/probes/mqar.yaml --model.context 64 --data.validation '{examples: 100, length: 64}' \
  --model.attention.num_heads 2 --trainer.max_steps 800 --trainer.val_check_interval 400 --trainer.accelerator cpu \
  --checkpoint '{every_n_steps: 50, keep: 100}' --output "$runs"
llmkit explain heads "$runs"/*/* --rows 16 --length 24 --output docs/studies/explain
rm -r "$runs"
