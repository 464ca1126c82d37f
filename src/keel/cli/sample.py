"""Sample responses of a model to a file of prompts, and write them as rows that `keel rank` reads.

Each row is {"prompt": ..., "responses": [...]}.

example:
  keel sample --model runs/sft/model --prompts.path prompts.jsonl \\
      --sampling.num-responses 4 --output responses.jsonl
"""

from typing import Any

from keel.cli.help import Verb
from keel.cli.settings import read_command
from keel.config import SampleConfig

VERB = Verb("sample", SampleConfig, str(__doc__))


def run(arguments: list[str]) -> dict[str, Any]:
    """Sample the responses, and return their number and file."""
    command = read_command(VERB, arguments)
    from keel.evaluation.sample import sample_responses

    counts = sample_responses(command.settings)
    print(f"{counts['responses']} responses to {counts['prompts']} prompts: {counts['output']}")
    return counts
