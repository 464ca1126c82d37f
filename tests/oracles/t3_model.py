"""T3's reference as a real model: a GPT-2 whose next-word law is that table exactly, and which ends after three words.

The trunk is drawn at random. There are 7 states and 32 hidden units, so an output matrix that gives every state the
next-word law it should have is the solution of a linear system. One unit is set apart: after three words it drowns all
others and says that the answer ends, with odds that no training moves. So each of the 15 answers is a text that ends,
and to answer three words is to be cut off, as T3 has it.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from .t3 import ANSWERS, END, LENGTH, REFERENCE, STATES, State

WORDS = ("a", "b", "</s>")
PROMPT = 0  # the prompt is the word a; its position tells it from an answer's a


def save_t3_model(folder: Path, seed: int = 0) -> Path:
    """Model and tokenizer as a plain Hugging Face folder."""
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_positions=LENGTH + 2,
        n_embd=32,
        n_layer=1,
        n_head=4,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config).double().eval()
        model.transformer.wpe.weight[LENGTH, 0] = 1000.0  # the final layer norm makes sqrt(31) of it, of others nothing
        hidden = torch.stack([model.transformer(torch.tensor([[PROMPT, *state]]))[0][0, -1] for state in STATES])
        logits = torch.tensor([REFERENCE[state[-1] if state else None] for state in STATES], dtype=torch.float64)
        head = model.lm_head.weight
        head[:, 0] = torch.tensor([0.0, 0.0, 8.0])
        head[:, 1:] = torch.linalg.lstsq(hidden[:, 1:], logits - hidden[:, :1] * head[:, 0]).solution.T
    model.float().save_pretrained(folder)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token=WORDS[END], pad_token=WORDS[END]).save_pretrained(folder)
    return folder


def text(answer: State) -> str:
    """The answer as it stands in a data file, after the prompt; whether it was cut off cannot be seen."""
    return "".join(f" {WORDS[token]}" for token in answer if token != END)


@torch.no_grad()
def answer_logprobs(folder: Path) -> Tensor:
    """log pi of T3's answers, by plain transformers, one after the other. [15]"""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()

    def logprob(answer: State) -> float:
        tokens = torch.tensor([[PROMPT, *answer]])
        law = model(tokens).logits[0, :-1].log_softmax(-1)
        return float(law.gather(1, tokens[0, 1:, None]).sum())

    return torch.tensor([logprob(answer) for answer in ANSWERS], dtype=torch.float64)
