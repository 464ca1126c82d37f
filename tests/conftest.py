"""What several tests share: tiny models made on the spot, real ones from outside the checkout, fixed threads and types.

Nothing here or in any test reaches the network.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Read when the libraries are first imported, so they are set before that.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]  # ids 0 to 3
WORDS = [f"w{i}" for i in range(28)]  # ids 4 to 31
TINY_SEED = 7


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums keep their order, and tests that run side by side do not fight for the cores."""
    torch.set_num_threads(1)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a C compiler: torch's own operations serve."""
    monkeypatch.setattr("keel.kernels.library.library", lambda: None)


@pytest.fixture
def float64() -> Iterator[None]:
    """New tensors are float64 within the test: `@pytest.mark.usefixtures("float64")`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with real models and data: KEEL_SHARED, or `shared` beside the checkout."""
    path = Path(os.environ.get("KEEL_SHARED", Path(__file__).parents[2] / "shared"))
    if not path.is_dir():
        pytest.skip("needs real models and data: set KEEL_SHARED to a folder that holds models/ and data/")
    return path


def word_tokenizer(pad: str) -> "PreTrainedTokenizerFast":
    """One word, one token; decoding joins the words by spaces."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: i for i, word in enumerate(SPECIALS + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=pad,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def save_tiny_model(config: "PretrainedConfig", pad: str, folder: Path) -> Path:
    """A random model and its tokenizer as a plain Hugging Face folder, the same on every run."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    with torch.random.fork_rng():
        torch.manual_seed(TINY_SEED)
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    word_tokenizer(pad).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama: 32 words, grouped-query attention, rotary positions, pad apart from the end token."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=len(SPECIALS + WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,  # wide, so that the next-word distribution is far from uniform
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return save_tiny_model(config, "<pad>", tmp_path_factory.mktemp("tiny_policy"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random GPT-2: 32 words, learned absolute positions, dropout in its config, pad = the end token."""
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=len(SPECIALS + WORDS),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.2,
        pad_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return save_tiny_model(config, "</s>", tmp_path_factory.mktemp("tiny_gpt2"))
