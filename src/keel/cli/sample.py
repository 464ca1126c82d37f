"""Sample responses of a model to a file of prompts, and write them as rows that `keel rank` reads.

Each row is {"prompt": ..., "responses": [...]}.

example:
  keel sample --model runs/sft/model --prompts.path prompts.jsonl \\
      --sampling.num-responses 4 --output responses.jsonl
"""

from typing import Any

from keel.cli.settings import read_command
from keel.config import SampleConfig


def run(arguments: list[str]) -> dict[str, Any]:
    """Returns how many answers were written, and where."""
    command = read_command("sample", SampleConfig, arguments, str(__doc__))
    from keel.evaluation.sample import sample_responses

    written = sample_responses(command.settings)
    print(f"{written['responses']} answers to {written['prompts']} prompts: {written['output']}")
    return written
