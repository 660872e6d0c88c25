#!/usr/bin/env bash
# Does pretraining help? Runs the protocol of docs/evidence.md, collects its results and draws tables and pictures.
# Stopped for any reason? Run the same line again: what is finished is skipped, what was interrupted continues.
#
#   examples/evidence.sh DATA OUTPUT [--tasks 503 506 505] [--jobs N]
#
# DATA holds nnU-Net datasets 503, 505, 506, 511 and 512 in raw format; everything is written below OUTPUT, the results
# into OUTPUT/evidence. Hours on two cores; each of N trainings at a time (as many as cores) uses one thread.
# BUDGET=smoke examples/evidence.sh ... does everything once, a quarter of an hour a task, to see that all is in place.
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
mkdir -p "$2"
DATA=$(cd "$1" && pwd) OUTPUT=$(cd "$2" && pwd)
shift 2
HERE=$(cd "$(dirname "$0")" && pwd)
BUDGET=${BUDGET:-cpu}
jobs=${JOBS:+--jobs $JOBS}

for name in raw preprocessed results; do
  mkdir -p "$OUTPUT/$name"
  export "nnUNet_$name=$OUTPUT/$name"
done
if [ "$BUDGET" != gpu ]; then
  # one thread each; for small crops loader processes take longer to start than to work
  export OMP_NUM_THREADS=1 nnUNet_n_proc_DA=0 nnUNet_def_n_proc=1
else
  # compiling would take a good part of trainings this short, and each starts processes that only write a few predictions
  export nnUNet_compile=f nnUNet_def_n_proc=2
fi
eval "$(hiendmae env)"

# shellcheck disable=SC2086  # two words or none
python "$HERE/evidence/run.py" "$DATA" "$OUTPUT/runs" --budget "$BUDGET" $jobs "$@"
mkdir -p "$OUTPUT/evidence"
python "$HERE/evidence/collect.py" "$OUTPUT/runs" "$OUTPUT/evidence" --budget "$BUDGET"
python "$HERE/evidence/report.py" "$OUTPUT/evidence"
