import json
from pathlib import Path

lines = Path("runs/quickstart/ppo/metrics.jsonl").read_text().splitlines()
for step in map(json.loads, lines):
    print(step["step"], step["objective/scores"], step["objective/kl"])
