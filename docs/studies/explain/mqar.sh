#!/usr/bin/env bash
# Scores of heads over the steps of one run: a decoder of two layers learns multi-query recall of four pairs.
# Writes docs/studies/explain/heads.{json,csv,png}. Takes about a minute of one core.
set -e
cd "$(dirname "$0")/../../.."
llmkit fit --config configs/probes/mqar.yaml --data.train '{pairs: 4, length: 32}' \
  --data.validation '{examples: 100, length: 32}' --model.context 32 --model.attention.num_heads 2 \
  --trainer.max_steps 800 --trainer.val_check_interval 400 --trainer.accelerator cpu \
  --checkpoint.every_n_steps 50 --checkpoint.keep 100
llmkit explain heads "$(ls -dv runs/mqar/version_* | tail -1)" --rows 16 --length 16 --output docs/studies/explain
