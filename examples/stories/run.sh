#!/bin/sh
# Run all steps, each of which is one command. README.md lists the environment variables.
# MODEL=models/stories PROMPTS=data/openings.jsonl VADER_LEXICON=data/vader_lexicon.txt sh examples/stories/run.sh
set -eu
HERE=$(dirname "$0")
MODEL=${MODEL:-models/stories}
PROMPTS=${PROMPTS:-data/openings.jsonl}
OUTPUT=${OUTPUT:-runs/stories}
TRAIN=${TRAIN:-500}
ALGORITHMS=${ALGORITHMS:-ppo a2c}
KEEL=${KEEL:-keel}
PYTHON=${PYTHON:-python3}
export VADER_LEXICON="${VADER_LEXICON:-data/vader_lexicon.txt}"

mkdir -p "$OUTPUT"
head -n "$TRAIN" "$PROMPTS" > "$OUTPUT/train.jsonl"
tail -n "+$((TRAIN + 1))" "$PROMPTS" > "$OUTPUT/heldout.jsonl"

$KEEL sample "$HERE/sample.yaml" --model "$MODEL" --prompts.path "$OUTPUT/train.jsonl" --output "$OUTPUT/answers.jsonl"
$PYTHON "$HERE/rank.py" "$OUTPUT/answers.jsonl" "$OUTPUT/rankings.jsonl"
$KEEL reward "$HERE/reward.yaml" --model "$MODEL" --data.path "$OUTPUT/rankings.jsonl" --output "$OUTPUT/reward"

for algorithm in $ALGORITHMS; do
    $KEEL train "$HERE/$algorithm.yaml" --policy.model "$MODEL" --prompts.path "$OUTPUT/train.jsonl" \
        --rewards "{\"model\": \"$OUTPUT/reward/model\"}" --output "$OUTPUT/$algorithm"
    $KEEL evaluate "$HERE/evaluate.yaml" --policy "$OUTPUT/$algorithm/policy" --against "$MODEL" \
        --prompts.path "$OUTPUT/heldout.jsonl" --rewards "{\"function\": \"$HERE/vader.py:valence\"}" \
        --output "$OUTPUT/$algorithm-evaluation.json"
    $PYTHON "$HERE/show.py" "$OUTPUT/$algorithm-evaluation.json"
done
