#!/bin/sh
# All steps from a folder of mel files to a scored submission; `make demo` runs this.
#
#   BIN   folder of the virtual environment's programs
#   DATA  a data set in the homework's layout, a folder that contains one as Dataset/, or a folder of
#         recordings by speaker. If empty, a small set is synthesised first. If there is a test_labels.csv beside the data set, the
#         submission is scored against it.
set -eu

work=demo
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$work"

step() { printf '\n== %s\n' "$*"; }

if [ -z "${DATA:-}" ]; then
  DATA=$work/synthetic
  step "Synthesise speech-like mels of 20 invented speakers"
  [ -f "$DATA/Dataset/metadata.json" ] || {
    rm -rf "$DATA"
    "$BIN/python" -m scripts.synthetic "$DATA" --seed 0
  }
fi
dataset=$DATA labels=$DATA/../test_labels.csv
if [ ! -f "$dataset/metadata.json" ] && [ -d "$DATA/Dataset" ]; then
  dataset=$DATA/Dataset labels=$DATA/test_labels.csv
fi

step "shardprep build"
rm -rf "$work/shards" "$work/runs"
"$BIN/shardprep" build "$dataset" "$work/shards"

step "shardprep verify --deep --against"
"$BIN/shardprep" verify "$work/shards" --deep --against "$dataset"

step "accelerate launch trainer/train.py, two processes on the CPU"
"$BIN/accelerate" launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no \
  --dynamo_backend no trainer/train.py --config demo \
  --data.shards "$work/shards" --train.runs "$work/runs"

step "shardprep predict"
"$BIN/shardprep" predict "$work/runs/demo" --shards "$work/shards" --split val \
  --out "$work/val.csv"
if [ ! -f "$dataset/testdata.json" ]; then
  step "Done: there is no testdata.json, so no submission; the run is in $work/runs/demo"
  exit
elif [ -f "$labels" ]; then
  "$BIN/shardprep" predict "$work/runs/demo" --shards "$work/shards" \
    --out "$work/submission.csv" --labels "$labels"
else
  "$BIN/shardprep" predict "$work/runs/demo" --shards "$work/shards" \
    --out "$work/submission.csv"
fi
step "Done: $work/submission.csv, and the run in $work/runs/demo"
head -3 "$work/submission.csv"
if [ "$DATA" = "$work/synthetic" ]; then
  echo "Test utterances come from other recordings than those of train and val, so fewer are right."
fi
