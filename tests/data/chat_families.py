"""The chat formats of public model families, as short templates written for these tests from the published formats.

The expected texts are written by hand from the same descriptions. Each conversation is `Hi`, `Yes.`, `Why?`, `No.`.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SEPARATE = "(another example)"
"""The second turn is an example of its own, since the template writes the first turn differently in a longer chat."""
REFUSED = "refused"


@dataclass(frozen=True)
class Family:
    """A chat format, and the texts that keel reads and learns with it."""

    name: str
    template: str
    tokens: tuple[str, ...]  # special tokens
    eos: str
    reads: str  # by a sampler, for the one message Hi
    learns: str  # of the response Yes.
    between: str  # read between the end of the first response and the second one, or SEPARATE
    system: str  # beginning of what is read for the system message Be kind. and Hi; or REFUSED
    bos: str | None = None
    other_ends: tuple[str, ...] = ()  # end tokens besides the one after a turn
    variables: tuple[tuple[str, Any], ...] = ()
    notes: str = ""


IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHATML_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
ASK_CHATML = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def with_default_system(text: str) -> str:
    """ChatML that begins with a system message if the conversation has none; tools are text of the user and model."""
    return (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n" + text + "<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'tool' %}"
        "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
        "{% elif m.tool_calls %}{{ '<|im_start|>assistant\n' + m.content }}{% for c in m.tool_calls %}"
        "{{ '<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
        "{% else %}" + CHATML_TURN + "{% endif %}{% endfor %}" + ASK_CHATML
    )


QWEN3 = (  # a turn after the last question has thoughts, which may be empty; earlier turns lose theirs
    "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}{% set text = parts[-1].lstrip('\n') %}"
    "{% set thoughts = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}"
    "{{ text + '<|im_end|>\n' }}{% else %}" + CHATML_TURN + "{% endif %}{% endfor %}" + ASK_CHATML + "{% if "
    "add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set first = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (first if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (  # the system message is a part of the last question
    "{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}{% set ns = namespace(last=0) %}{% for m in turns %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ bos_token }}"
    "{% for m in turns %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system if loop.index0 == ns.last else '') + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ('user', 'assistant') %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (  # the text ends with the end of text, but only without a header
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# DeepSeek's tokens have a full-width bar, and a block in place of a space.
R1_BOS, R1_EOS, R1_USER, R1_ASSISTANT = (
    f"<\uff5c{name}\uff5c>"
    for name in ("begin\u2581of\u2581sentence", "end\u2581of\u2581sentence", "User", "Assistant")
)
R1 = (
    (  # opens the thoughts for the model, and writes none of earlier turns
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER' + m.content }}{% elif m.role == 'assistant' %}"
        "{{ 'ASSISTANT' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT<think>\n' }}{% endif %}"
    )
    .replace("'USER'", f"'{R1_USER}'")
    .replace("'ASSISTANT", f"'{R1_ASSISTANT}")
)
COMMAND_R = (
    "{{ bos_token }}{% set names = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'} %}"
    "{% for m in messages %}{% if m.role not in names %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ '<|START_OF_TURN_TOKEN|><|' + names[m.role] + '_TOKEN|>' + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
    "{{ eos_token if m.role == 'assistant' }}{{ '\n' if m.role != 'assistant' or not loop.last }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GRANITE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + ('tool_response' if m.role == 'tool' else m.role) }}"
    "{{ '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
VICUNA = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% elif m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TURN = "<|START_OF_TURN_TOKEN|>"

FAMILIES = [
    Family(
        "Qwen2.5",
        with_default_system("You are Qwen."),
        IM,
        "<|im_end|>",
        "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "Yes.<|im_end|>",
        "\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi",
        other_ends=("<|endoftext|>",),
        notes="writes a system message of its own if there is none",
    ),
    Family(
        "Qwen3",
        QWEN3,
        (*IM, "<think>", "</think>"),
        "<|im_end|>",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\nYes.<|im_end|>",
        SEPARATE,
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi",
        other_ends=("<|endoftext|>",),
        notes="thoughts, empty ones too, are learned; earlier turns lose them",
    ),
    Family(
        "Qwen3, enable_thinking=false",
        QWEN3,
        (*IM, "<think>", "</think>"),
        "<|im_end|>",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "Yes.<|im_end|>",
        SEPARATE,
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi",
        other_ends=("<|endoftext|>",),
        variables=(("enable_thinking", False),),
        notes="the sampler reads empty thoughts, so they are not learned",
    ),
    Family(
        "Llama 2",
        LLAMA2,
        ("<s>", "</s>"),
        "</s>",
        "<s>[INST] Hi [/INST]",
        " Yes. </s>",
        "<s>[INST] Why? [/INST]",
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi",
        bos="<s>",
        notes="no header for the assistant; refuses roles that do not alternate",
    ),
    Family(
        "Llama 3",
        LLAMA3,
        (
            "<|begin_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|end_of_text|>",
            "<|eom_id|>",
        ),
        "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Yes.<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>",
        bos="<|begin_of_text|>",
        other_ends=("<|end_of_text|>", "<|eom_id|>"),
        notes="the role of a tool is ipython",
    ),
    Family(
        "Mistral v0.3",
        MISTRAL,
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "</s>",
        "<s>[INST] Hi[/INST]",
        " Yes.</s>",
        "[INST] Why?[/INST]",
        "<s>[INST] Be kind.\n\nHi",
        bos="<s>",
        notes="the system message is a part of the last question, so turns become separate examples",
    ),
    Family(
        "Gemma 2",
        GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
        "Yes.<end_of_turn>",
        "\n<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        REFUSED,
        bos="<bos>",
        other_ends=("<eos>",),
        notes="no system role; the end of a turn is not the tokenizer's end token",
    ),
    Family(
        "Phi-3",
        PHI3,
        ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
        "<|endoftext|>",
        "<|user|>\nHi<|end|>\n<|assistant|>\n",
        "Yes.<|end|>",
        "\n<|user|>\nWhy?<|end|>\n<|assistant|>\n",
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHi",
        other_ends=("<|endoftext|>",),
        notes="a conversation also ends with the end of text, which is not learned: no sampler gets there",
    ),
    Family(
        "Zephyr",
        ZEPHYR,
        ("<s>", "</s>"),
        "</s>",
        "<|user|>\nHi</s>\n<|assistant|>\n",
        "Yes.</s>",
        "\n<|user|>\nWhy?</s>\n<|assistant|>\n",
        "<|system|>\nBe kind.</s>\n<|user|>\nHi",
        bos="<s>",
        notes="roles are ordinary text, so a message can also write them",
    ),
    Family(
        "SmolLM2",
        with_default_system("You are SmolLM."),
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        "<|im_start|>system\nYou are SmolLM.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "Yes.<|im_end|>",
        "\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi",
        notes="writes a system message of its own if there is none",
    ),
    Family(
        "DeepSeek-R1",
        R1,
        (R1_BOS, R1_EOS, R1_USER, R1_ASSISTANT, "<think>", "</think>"),
        R1_EOS,
        f"{R1_BOS}{R1_USER}Hi{R1_ASSISTANT}",
        f"Yes.{R1_EOS}",
        f"{R1_USER}Why?{R1_ASSISTANT}",
        f"{R1_BOS}Be kind.{R1_USER}Hi",
        bos=R1_BOS,
        notes="a sampler also reads `<think>` and a line break, which a conversation never has; thoughts are omitted",
    ),
    Family(
        "Command R",
        COMMAND_R,
        ("<BOS_TOKEN>", TURN, "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
        "<|END_OF_TURN_TOKEN|>",
        f"<BOS_TOKEN>{TURN}<|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>{TURN}<|CHATBOT_TOKEN|>",
        "Yes.<|END_OF_TURN_TOKEN|>",
        f"{TURN}<|USER_TOKEN|>Why?<|END_OF_TURN_TOKEN|>{TURN}<|CHATBOT_TOKEN|>",
        f"<BOS_TOKEN>{TURN}<|SYSTEM_TOKEN|>Be kind.<|END_OF_TURN_TOKEN|>{TURN}<|USER_TOKEN|>Hi",
        bos="<BOS_TOKEN>",
        notes="this template has no role for tools",
    ),
    Family(
        "OLMo 2",
        OLMO2,
        ("<|endoftext|>",),
        "<|endoftext|>",
        "<|endoftext|><|user|>\nHi\n<|assistant|>\n",
        "Yes.<|endoftext|>",
        "\n<|user|>\nWhy?\n<|assistant|>\n",
        "<|endoftext|><|system|>\nBe kind.\n<|user|>\nHi",
        bos="<|endoftext|>",
        notes="the first token is also the end token; roles are ordinary text",
    ),
    Family(
        "Granite 3",
        GRANITE,
        ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
        "<|end_of_text|>",
        "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        "Yes.<|end_of_text|>",
        "\n<|start_of_role|>user<|end_of_role|>Why?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        "<|start_of_role|>system<|end_of_role|>Be kind.<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Hi",
        notes="the role of a tool is tool_response",
    ),
    Family(
        "Vicuna",
        VICUNA,
        ("<s>", "</s>"),
        "</s>",
        "USER: Hi ASSISTANT:",
        " Yes.</s>",
        "USER: Why? ASSISTANT:",
        "Be kind. USER: Hi",
        notes="roles are ordinary text; other turns are omitted",
    ),
]


@cache
def family_tokenizer(family: Family) -> Any:
    """A byte-level tokenizer with the special tokens of the family. Those around thoughts are ordinary tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([""], trainer)
    thoughts = ("<think>", "</think>")
    made.add_special_tokens(
        [*(AddedToken(each, special=True) for each in family.tokens if each not in thoughts), "<pad>"]
    )
    made.add_tokens([AddedToken(each, special=False) for each in family.tokens if each in thoughts])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=family.eos, bos_token=family.bos, pad_token="<pad>"
    )
    tokenizer.chat_template = family.template
    return tokenizer
