"""Answers made by hand: whoever judges them needs no model."""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from keel.data.batches import Rollouts
from keel.data.padding import pad_rows
from keel.data.prompts import Prompt
from keel.rollout.sampler import decode_responses

PAD, END = 0, 1


def tokenizer_of(pieces: Sequence[str], fused: bool = False) -> PreTrainedTokenizerFast:
    """Ids 2, 3, ... are the given pieces; decoding joins them by spaces or, if `fused`, by nothing."""
    vocabulary = {piece: i for i, piece in enumerate(["<pad>", "</s>", *pieces])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    if fused:
        words.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


def answers(
    tokenizer: PreTrainedTokenizerFast,
    responses: Sequence[Sequence[int]],
    columns: Sequence[dict[str, Any]] = (),
    content: Any = "Say:",
) -> Rollouts:
    """One prompt, asked once for each response; a response without the end token is truncated."""
    prompts = [Prompt(content, "Say:", (2,), columns[i] if columns else {}) for i in range(len(responses))]
    prompt_tokens, prompt_mask = pad_rows([prompt.tokens for prompt in prompts], PAD, side="left")
    response_tokens, response_mask = pad_rows(responses, PAD)
    truncated = torch.tensor([response[-1] != END for response in responses])
    return Rollouts(
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        prompt_mask=prompt_mask,
        response_tokens=response_tokens,
        response_mask=response_mask,
        logprobs=torch.zeros(response_tokens.shape),
        truncated=truncated,
        texts=decode_responses(tokenizer, prompts, response_tokens, response_mask, truncated),
    )


def words(*texts: str) -> tuple[PreTrainedTokenizerFast, Rollouts]:
    """Each text as a finished answer, one token a word."""
    pieces = ["Say:", *dict.fromkeys(word for text in texts for word in text.split())]
    tokenizer = tokenizer_of(pieces)
    return tokenizer, answers(tokenizer, [[2 + pieces.index(word) for word in text.split()] + [END] for text in texts])
