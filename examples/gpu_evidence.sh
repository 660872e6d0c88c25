#!/usr/bin/env bash
# The protocol of docs/evidence.md on one GPU: ViT-S, crops of 96³, the methods' own decoders. Unattended: stopped for any
# reason, the same line goes on. Its results stay below OUTPUT (OUTPUT/evidence).
#
#   examples/gpu_evidence.sh DATA OUTPUT [--tasks 503 506 505] [--jobs N]
#
# Not tried, no GPU was at hand. Computed for one that keeps up 20 TFLOP/s, with 12 cores for loaders: pretraining 7 hours
# (18 runs), fine-tuning 27 hours (405 trainings of 1,000 batches and a validation, 4 minutes each, one at a time). What
# pretraining keeps on the GPU, activations and weights with AdamW's moments, is 11 GB at most, also computed.
set -euo pipefail
BUDGET=gpu JOBS=${JOBS:-1} exec "$(dirname "$0")/evidence.sh" "$@"
