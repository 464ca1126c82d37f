"""Make the tasks of the speed benchmarks: model folders, reward models and prompts, the same files for keel and TRL."""

import json
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

PAD, END, FIRST_WORD = 0, 1, 2
PROMPT_TOKENS = (16, 32)  # shortest and longest prompt of a random task
NUM_PROMPTS = 1024


@dataclass(frozen=True)
class Task:
    """One job: the settings that both sides share."""

    name: str
    policy: str  # folders
    reward: str
    prompts: str  # jsonl with `prompt`; dpo and reward: also `chosen`, `rejected`; sft: `completion`
    batch_size: int = 64
    max_response_tokens: int = 64
    update_epochs: int = 4
    minibatches: int = 4
    learning_rate: float = 1e-7  # while time is taken the model stays as it is, or the sides' answers drift in length
    real_learning_rate: float = 0.0  # to compare what the sides learn; 0 where there is nothing to learn
    kl_coef: float = 0.05
    steps: int = 4  # of which the first is not counted
    seed: int = 0
    threads: int = 2
    algorithm: str = "ppo"
    group_size: int = 4  # of grpo and rloo
    full_length: bool = False  # forbid the end token
    dtype: str = "float32"

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)))
        return path

    @staticmethod
    def read(path: str) -> "Task":
        return Task(**json.loads(Path(path).read_text()))

    def with_(self, **changes: Any) -> "Task":
        return replace(self, **changes)


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int
    layers: int
    vocabulary: int = 4096

    @property
    def label(self) -> str:
        return next((name for name, shape in SHAPES.items() if shape == self), f"{self.hidden}x{self.layers}")

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=END,
        )


SHAPES = {"7M": Shape(256, 6), "31M": Shape(512, 8)}


def random_task(shape: Shape, folder: Path, natural: bool, max_response_tokens: int = 64) -> Task:
    """Make a random model whose responses have full length, or geometric lengths with a mean of a third of it."""
    length = f"natural-{max_response_tokens}" if natural else "full"
    place = folder / f"{shape.label}-{shape.vocabulary}-{length}"
    if not place.exists():
        tokenizer = word_tokenizer(shape.vocabulary)
        end_rate = 3 / max_response_tokens if natural else 1e-9
        save(language_model(shape, end_rate), tokenizer, place / "policy")
        reward_model(place / "policy", place / "reward")
        write_prompts(place / "prompts.jsonl", shape.vocabulary)
    return Task(
        f"{shape.label}, {'natural' if natural else 'full'} length",
        str(place / "policy"),
        str(place / "reward"),
        str(place / "prompts.jsonl"),
        max_response_tokens=max_response_tokens,
    )


def story_task(model: Path, openings: Path, folder: Path) -> Task:
    """Make a task with a pre-trained model and real prompts. The reward model is a classifier on the same trunk."""
    reward, prompts = folder / f"{model.name}-reward", folder / f"{model.name}-prompts.jsonl"
    if not prompts.exists():
        reward_model(model, reward)
        rows = [json.loads(line)["prompt"] for line in openings.read_text().splitlines()[:NUM_PROMPTS]]
        prompts.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    return Task(model.name, str(model), str(reward), str(prompts), real_learning_rate=3e-4)


def language_model(shape: Shape, end_rate: float, seed: int = 0) -> LlamaForCausalLM:
    """Make a random Llama that ends a response with probability `end_rate` at every token, whatever the text.

    All embeddings share their first coordinate, which then dominates the residual stream. Only the end token reads it.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(shape.config())
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[[PAD, END]] = 0.0
        states = model.model(torch.randint(FIRST_WORD, shape.vocabulary, (64, 16))).last_hidden_state[:, -1]
        others = torch.logsumexp((states @ model.lm_head.weight.T)[:, FIRST_WORD:], dim=1).mean()
        wanted = others + torch.logit(torch.tensor(end_rate))
        model.lm_head.weight[END, 0] = wanted / states[:, 0].mean()
        model.lm_head.weight[PAD, 0] = -30.0 / states[:, 0].mean()
    return model


def reward_model(policy: Path, folder: Path) -> None:
    """Make a classifier on the policy's trunk, with a random head."""
    from keel.models.loading import load_classifier  # the other side of a comparison has no keel

    torch.manual_seed(1)
    model = load_classifier(str(policy), to_train=True)
    torch.nn.init.normal_(model.score.weight, std=0.05)
    save(model, AutoTokenizer.from_pretrained(policy), folder)


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "</s>": END} | {f"w{i}": i for i in range(FIRST_WORD, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=1024
    )


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_prompts(path: Path, vocabulary: int) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(NUM_PROMPTS):
            words = (f"w{draw.randrange(FIRST_WORD, vocabulary)}" for _ in range(draw.randint(*PROMPT_TOKENS)))
            file.write(json.dumps({"prompt": " ".join(words)}) + "\n")
