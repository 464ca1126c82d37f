#!/bin/sh
# Run all stages, from the data to the first weeks after the release: sh examples/support/run.sh FOLDER
# Stops at the first gate that is not met. README.md explains each gate.
set -eu
HERE=$(cd "$(dirname "$0")" && pwd)
FOLDER=${1:-runs/support}
KEEL=${KEEL:-keel}
PYTHON=${PYTHON:-python3}

stage() { printf '\n== %s\n' "$1"; }

stage "0 data"
$PYTHON "$HERE/make_data.py" "$FOLDER"
cp "$HERE/rules.py" "$FOLDER"
cd "$FOLDER"
for held_out in release watch; do  # exit code 2 if a prompt is in both files
    $KEEL data check "data/$held_out.jsonl" --against data/dialogues.jsonl --against data/ratings.jsonl --against data/rl.jsonl
done
$KEEL data check data/release.jsonl --against data/watch.jsonl

stage "1 supervised fine-tuning"
$KEEL sft "$HERE/base.yaml"
$KEEL sft "$HERE/sft.yaml"

stage "2 rankings"
$KEEL sample "$HERE/sample.yaml"
head -n 600 answers.jsonl > answers-first.jsonl
tail -n 600 answers.jsonl > answers-second.jsonl
$PYTHON "$HERE/raters.py" answers-first.jsonl ratings.db anna ben          # keel rank
$PYTHON "$HERE/raters.py" answers-second.jsonl ratings-second.db cleo dan  # keel rank
for group in "" -second; do
    $KEEL rank --store "ratings$group.db" --stats --json > "agreement$group.json"
    $PYTHON "$HERE/gates.py" raters 0.4 < "agreement$group.json"
    $KEEL rank --store "ratings$group.db" --export "rankings$group.jsonl"
done

stage "3 reward models"  # exit code 1 if the gate is not met
$KEEL reward "$HERE/reward.yaml"
$KEEL reward "$HERE/second.yaml"

stage "4 policy"  # exit code 3 after a critical finding of the doctor, or a collapse
$KEEL train "$HERE/ppo.yaml"
$KEEL doctor ppo
$KEEL report ppo

stage "5 release"
$KEEL evaluate "$HERE/evaluate.yaml" --pairs pairs.jsonl --output before-people.json
$PYTHON "$HERE/raters.py" pairs.jsonl pairs.db eva finn                    # keel rank --mode pairs
$KEEL rank --store pairs.db --export judged.jsonl
$KEEL evaluate "$HERE/evaluate.yaml" --pairs pairs.jsonl --judgements judged.jsonl --gate "$HERE/release.gate" \
    --output evaluation.json

stage "6 after the release"
$KEEL drift "$HERE/drift.yaml" --output week1.json
$PYTHON "$HERE/gates.py" drift < week1.json
