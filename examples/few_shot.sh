#!/usr/bin/env bash
# Four pretraining methods and training from scratch, with one labelled case and with all of them, on every fold of a
# dataset; prints the table of `hiendmae compare`. Stopped for any reason? Run the same line again: what is finished is
# skipped, what was interrupted continues from its last checkpoint, if there is one. Other numbers need another
# OUTPUT_DIR and another PLANS, so that nothing is taken for what it is not.
#
#   examples/few_shot.sh LABELLED_ID OUTPUT_DIR [PRETRAINING_ID ...]
#
# nnUNet_raw, nnUNet_preprocessed and nnUNet_results must be set. Without PRETRAINING_ID the images of the labelled
# dataset are used, without their labels; those of validation cases are among them, test images are not. The defaults
# are for two CPU cores and an hour or so; every number can be set from outside.
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
LABELLED=$1 OUTPUT=$2
shift 2
[ $# -gt 0 ] && IMAGES=("$@") || IMAGES=("$LABELLED")

METHODS=${METHODS:-"hiendmae mim glmae mae3d"}
ENCODER=${ENCODER:-vit_nano_p8}
SPACING=${SPACING:-"2 2 2"}            # mm, D H W
SHOTS=${SHOTS:-1}
REPEATS=${REPEATS:-1}                  # few-shot folds of each fold, on other cases; more may be asked for later
PRETRAIN_EPOCHS=${PRETRAIN_EPOCHS:-10}
PRETRAIN_STEPS=${PRETRAIN_STEPS:-30}   # per epoch
PRETRAIN_BATCH=${PRETRAIN_BATCH:-4}    # volumes per step
PRETRAIN_LR=${PRETRAIN_LR:-1e-3}
EPOCHS=${EPOCHS:-10}                   # of fine-tuning
ITERATIONS=${ITERATIONS:-15}           # per epoch
BATCH=${BATCH:-2}
LR=${LR:-1e-3}
WIDTH=${WIDTH:-16}                     # of the decoder
DEVICE=${DEVICE:-cpu}
PROCESSES=${PROCESSES:-2}
PLANS=${PLANS:-FewShot}                # beginning of the names of all plans

# small heads to go with the small encoder; for a real one: OPTIONS=none, and the methods' own defaults are used
small_options() {
  [ "${OPTIONS:-small}" = none ] && return 0
  local decoder="decoder_dim=96 decoder_depth=2 decoder_heads=4"
  case $1 in
    mim) echo "--set $decoder crops_level2=2 crops_level3=1 views_per_part=2" ;;
    glmae) echo "--set $decoder head_hidden=256 head_dim=64 local_views=2" ;;
    mae3d) echo "--set $decoder" ;;
  esac
}

eval "$(hiendmae env)"
mkdir -p "$OUTPUT"

# what is finished counts as done: it must have been done with the same numbers
settings="$LABELLED ${IMAGES[*]} $PLANS $ENCODER $SPACING $PRETRAIN_EPOCHS $PRETRAIN_STEPS $PRETRAIN_BATCH $PRETRAIN_LR"
settings+=" $EPOCHS $ITERATIONS $BATCH $LR $WIDTH ${OPTIONS:-small}"
if [ -f "$OUTPUT/settings" ]; then
  if [ "$(cat "$OUTPUT/settings")" != "$settings" ]; then
    echo "$OUTPUT was made with '$(cat "$OUTPUT/settings")', now '$settings'; choose another OUTPUT_DIR and PLANS" >&2
    exit 2
  fi
elif compgen -G "$nnUNet_results/Dataset$(printf %03d "$LABELLED")_*/*__${PLANS}_*__3d_fullres" >/dev/null; then
  echo "there are results of plans ${PLANS}_… that are not of $OUTPUT; choose another PLANS" >&2
  exit 2
fi
echo "$settings" >"$OUTPUT/settings"

say() { printf '%s  %s\n' "$(date +%H:%M:%S)" "$*"; }

# runs a command with its output in a log; shows the end of the log if it fails
logged() {
  local log=$1
  shift
  "$@" >"$log" 2>&1 && return 0
  tail -n 20 "$log" >&2
  echo "failed: $* (see $log)" >&2
  exit 1
}

# the dataset's own folds, made as nnU-Net makes them where there are none yet, and few-shot folds of each; first,
# because whatever is wrong with them shows before the long work
hiendmae splits -d "$LABELLED" --shots "$SHOTS" --repeats "$REPEATS" --of-fold 0 --json >/dev/null
listed=$(hiendmae splits -d "$LABELLED" --list --json)
own=$(python3 -c 'import json, sys; print(*[f["fold"] for f in json.load(sys.stdin)["folds"] if "kind" not in f])' \
  <<<"$listed")
folds=()
for fold in $own; do
  appended=$(hiendmae splits -d "$LABELLED" --shots "$SHOTS" --repeats "$REPEATS" --of-fold "$fold" --json)
  # shellcheck disable=SC2207  # numbers
  folds+=("$fold" $(python3 -c 'import json, sys; print(*[f["fold"] for f in json.load(sys.stdin)["folds"]])' \
    <<<"$appended"))
done

# shellcheck disable=SC2086  # SPACING is three words
hiendmae preprocess -d "${IMAGES[@]}" -p "$PLANS" --spacing $SPACING -np "$PROCESSES"

for method in $METHODS; do
  run=$OUTPUT/pretraining_$method
  [ -f "$run/finished" ] && continue
  say "pretraining: $method"
  resume=()
  [ -f "$run/run.json" ] && resume=(--c)
  # shellcheck disable=SC2046  # options are words
  logged "$OUTPUT/pretraining_$method.log" hiendmae pretrain -d "${IMAGES[@]}" -p "$PLANS" --method "$method" \
    --encoder "$ENCODER" --epochs "$PRETRAIN_EPOCHS" --steps-per-epoch "$PRETRAIN_STEPS" \
    --batch-size "$PRETRAIN_BATCH" --lr "$PRETRAIN_LR" --workers "$PROCESSES" -device "$DEVICE" -o "$run" \
    $(small_options "$method") "${resume[@]}"
  touch "$run/finished"
done

# plans of one candidate: name, trainer, encoder file, further options
candidates=()
plan() {
  local name=$1 trainer=$2 encoder=$3
  shift 3
  candidates+=("$name $trainer")
  [ -f "$OUTPUT/planned_$name" ] && return 0
  say "planning and preprocessing: $name"
  logged "$OUTPUT/plan_$name.log" hiendmae plan -d "$LABELLED" -w "$encoder" --name "$name" --epochs "$EPOCHS" \
    --iterations-per-epoch "$ITERATIONS" --val-iterations-per-epoch 2 --batch-size "$BATCH" --lr "$LR" \
    --weight-decay 1e-5 --drop-path 0 --grad-clip 12 --decoder-width "$WIDTH" -np "$PROCESSES" "$@"
  # the arrays of the first candidate are those of all: then plan prints no such line
  if grep -q '^  nnUNetv2_preprocess' "$OUTPUT/plan_$name.log"; then
    logged "$OUTPUT/preprocess_$name.log" nnUNetv2_preprocess -d "$LABELLED" -plans_name "$name" -c 3d_fullres \
      -np "$PROCESSES"
  fi
  touch "$OUTPUT/planned_$name"
}

declare -A TRAINERS=([hiendmae]=HiEndMAE [mim]=MiM [glmae]=GLMAE [mae3d]=MAE3D)
first=
for method in $METHODS; do
  file=$OUTPUT/pretraining_$method/encoder.safetensors
  first=${first:-$file}
  plan "${PLANS}_$method" "nnUNetTrainer_${TRAINERS[$method]}" "$file"
done
plan "${PLANS}_scratch" nnUNetTrainer_ViTUNETR "$first" --from-scratch

for fold in "${folds[@]}"; do
  for candidate in "${candidates[@]}"; do
    read -r name trainer <<<"$candidate"
    result=$(echo "$nnUNet_results"/Dataset"$(printf %03d "$LABELLED")"_*/"${trainer}__${name}__3d_fullres/fold_$fold")
    [ -f "$result/validation/summary.json" ] && continue
    say "fold $fold: $name"
    resume=()
    [ -f "$result/checkpoint_latest.pth" ] || [ -f "$result/checkpoint_final.pth" ] && resume=(--c)
    logged "$OUTPUT/train_${name}_$fold.log" nnUNetv2_train "$LABELLED" 3d_fullres "$fold" -p "$name" -tr "$trainer" \
      -device "$DEVICE" "${resume[@]}"
  done
done

say "comparison in $OUTPUT/comparison"
hiendmae compare -d "$LABELLED" --runs "${PLANS}_*" --baseline "${PLANS}_scratch" -o "$OUTPUT/comparison"
