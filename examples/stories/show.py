"""Print three held-out openings with a response of both models: python show.py evaluation.json"""

import json
import sys
from pathlib import Path

for row in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["answers"][:3]:
    print(f"\n{row['prompt']}")
    for side, title in {"against": "before", "policy": "after "}.items():
        print(f"  {title} {row[f'{side}_scores'][0]:+.2f} {' '.join(row[side][0].split())}")
