"""Fine-tune a language model on demonstrations: conversations, rows of prompt and completion, or text.

example:
  keel sft --output runs/sft --model distilgpt2 \\
      --data.path demonstrations.jsonl --epochs 2
"""

from typing import Any

from keel.cli.help import Verb
from keel.cli.settings import read_command
from keel.cli.tables import print_table
from keel.config import SftConfig

VERB = Verb("sft", SftConfig, str(__doc__), flags=("resume",))


def run(arguments: list[str]) -> dict[str, Any]:
    """Fine-tune the model, and return its metrics on the held-out rows."""
    command = read_command(VERB, arguments)
    from keel.supervised.sft import sft

    metrics = sft(command.settings, resume=command.resume)
    print_table("held-out rows", {"model": metrics}, f"model: {command.settings.output}/model")
    return metrics
