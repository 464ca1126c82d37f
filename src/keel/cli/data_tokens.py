"""Read the rows of a data file as tokens of a model, for `keel data check --model`."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from keel.config import DataCheckConfig


def model_metrics(settings: DataCheckConfig, purpose: str) -> dict[str, Any]:
    """Encode the rows with the model's tokenizer and chat template, and return counts, refusals and rows to show.

    Raises ConfigError for a model without a tokenizer or a chat template that the rows need.
    """
    from keel.data.check import LISTED_ERRORS, error_entry, length_quantiles
    from keel.data.encoded_rows import encode_rows

    assert settings.model is not None
    encoding = _row_encoding(settings, purpose)
    encoded = encode_rows(encoding, settings.split)
    shown = [
        {
            "line": row.line,
            "tokens": len(row.tokens),
            "marked": sum(row.marked),
            "mark": row.mark,
            "runs": list(row.runs(encoding.example_format.tokenizer)),
        }
        for row in encoded.rows[: settings.show]
    ]
    return {
        "name": settings.model,
        "tokens": length_quantiles([len(row.tokens) for row in encoded.rows]),
        "marked": sum(sum(row.marked) for row in encoded.rows),
        "mark": next((row.mark for row in encoded.rows if row.mark), ""),
        "refused": {
            "rows": len(encoded.refused),
            "why": [error_entry(error) for error in encoded.refused[:LISTED_ERRORS]],
        },
        "remarks": encoded.notes.lines(),
        "shown": shown,
    }


def shown_lines(row: Mapping[str, Any]) -> Iterator[str]:
    """Format an entry of `shown` in `model_metrics`: a line for the row, then one for each run of tokens."""
    marked = f", {row['marked']} {row['mark']}" if row["mark"] else ""
    yield f"line {row['line']}: {row['tokens']} tokens{marked}"
    for name, texts in row["runs"]:
        yield f"  {name:<9}{' | '.join(json.dumps(text, ensure_ascii=False)[1:-1] for text in texts)}"


def _row_encoding(settings: DataCheckConfig, purpose: str) -> Any:
    from transformers import AutoConfig, GenerationConfig

    from keel.data.chats import turn_end_id
    from keel.data.encoded_rows import RowEncoding
    from keel.data.examples import ExampleFormat
    from keel.data.named_templates import set_chat_template
    from keel.data.prompts import PromptFormat
    from keel.models.loading import configured_ends, load_tokenizer

    name = str(settings.model)
    tokenizer = load_tokenizer(name)
    set_chat_template(tokenizer, settings.chat_template, settings.template)
    try:
        generation = GenerationConfig.from_pretrained(name)
    except OSError:  # most reward models have no generation settings
        generation = None
    ends = configured_ends(generation, tokenizer)
    turn_end = turn_end_id(tokenizer) if settings.chat_template else None
    ends += [turn_end] if turn_end is not None and turn_end not in ends else []
    ends = ends or [int(tokenizer.pad_token_id)]
    config = AutoConfig.from_pretrained(name) if (Path(name) / "config.json").is_file() else None
    prompt_format = PromptFormat(settings.column, settings.chat, settings.system)
    example_format = ExampleFormat(tokenizer, ends, settings.max_tokens, settings.turns, prompt_format)
    scores = any("SequenceClassification" in each for each in getattr(config, "architectures", None) or [])
    template = getattr(config, "keel_template", "{prompt}{response}")
    return RowEncoding(settings.path, purpose, example_format, _reader(tokenizer, template) if scores else None)


def _reader(tokenizer: Any, template: str) -> Any:
    """Return a function that encodes the responses of a ranking as a reward model reads them."""
    from keel.models.reading import Reading

    def encode(ranking: Any, limit: int) -> tuple[list[list[int]], bool]:
        readings = [Reading(ranking.prompt, text, tools=ranking.tools) for text in ranking.responses]
        texts = [reading.encode(tokenizer, template, limit, lambda ids: ids) for reading in readings]
        return [ids for ids, _ in texts], any(cut for _, cut in texts)

    return encode
