"""Make tiny random models of the causal language model families of transformers.

The settings of a family's config class are shrunk by their names. EXCEPTIONS holds the settings that need another rule.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

VOCABULARY = 320
LARGEST = 4_000_000  # parameters: a model beyond it was not shrunk
LAYERS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
]
# of 16 tokens: more than rows of keel's own trial have, fewer than rows of the benchmark
WINDOWS = (
    "sliding_window attention_window window_size attention_chunk_size sliding_window_size window attention_window_size "
    "index_topk block_size keep_window_size local_attention local_attn_chunk_length lsh_attn_chunk_length"
)
SIZES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input n_words entity_vocab_size",
    32: "hidden_size d_model n_embd dim hidden_dim embed_dim decoder_hidden_size embedding_size emb_dim n_embed "
    "word_embed_proj_dim hidden_size_global embedding_dim width output_hidden_size projection_dim "
    "attention_hidden_size",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff n_inner dff dim_ff d_inner intermediate_dim "
    "ffn_hidden_size feed_forward_size",
    24: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "expert_ffn_hidden_size shared_intermediate_size intermediate_size_mlp moe_ffn_hidden_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads num_experts n_routed_experts "
    "num_local_experts moe_num_experts n_experts linear_num_value_heads linear_num_heads "
    "index_block_size index_topk_blocks",
    2: " ".join(LAYERS) + " num_encoder_layers num_blocks num_key_value_heads n_head_kv num_kv_heads kv_n_heads "
    "multi_query_group_num swa_num_key_value_heads num_global_key_value_heads num_experts_per_tok "
    "num_experts_per_token moe_topk top_k_experts moe_top_k moe_k num_selected_experts top_k linear_num_key_heads",
    8: "head_dim kv_channels attention_head_dim d_kv swa_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim "
    "qk_head_dim global_head_dim swa_v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim "
    "ssm_state_size state_size mamba_d_state mamba_head_dim mamba_d_head d_state mamba_headdim mamba_state_dim "
    "mamba_num_heads mamba_n_heads n_mamba_heads mamba_chunk_size chunk_size index_head_dim index_n_heads "
    "hidden_size_per_layer_input",
    16: f"q_lora_rank kv_lora_rank o_lora_rank {WINDOWS}",
    1: "n_group topk_group n_groups mamba_n_groups n_shared_experts num_shared_experts num_expert_group",
    256: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_sequence_length "
    "max_target_positions seq_length max_seq_length max_source_positions",
    28: "image_size",
    14: "patch_size",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}

LATENT = {"num_key_value_heads": 4, "qk_head_dim": 16}
DECODER = {"is_decoder": True}
MAMBA_HEADS = {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 1,
    "make_ngram_vocab_size_divisible_by": 8,
    "heads_per_ngram": 2,
    "ple_embed_dim": 16,
}
SHARED = {"num_kv_shared_layers": 0, "global_head_dim": 8, "num_global_key_value_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LATENTS = "axk1 axk2 bailing_hybrid deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_linear minicpm3 youtu"
DECODERS = (
    "bert camembert data2vec-text electra ernie megatron-bert rembert roberta roberta-prelayernorm roformer "
    "xlm-roberta xlm-roberta-xl bert-generation big_bird"
)
EXCEPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(LATENTS.split(), LATENT),
    **dict.fromkeys(DECODERS.split(), DECODER),
    **{family: {"text_config": SHARED} for family in ["gemma4", "gemma4_unified"]},
    **dict.fromkeys(["gemma4_text", "gemma4_unified_text"], SHARED),
    **{family: {"rotary_dim": 4} for family in ["codegen", "gptj"]},
    **{family: {"head_dim": 8} for family in ["hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"]},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**LATENT, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "emu3": {"text_config": {"pad_token_id": 0, "bos_token_id": 1}},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 8, "mamba_n_heads": 8},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": 48,
        "laurel_rank": 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_n_heads": 2},
    "mllama": {"text_config": {"bos_token_id": 1}},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "recurrent_gemma": {"lru_width": 32},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "roc_bert": {
        "shape_vocab_size": 64,
        "pronunciation_vocab_size": 64,
        "shape_embed_dim": 16,
        "pronunciation_embed_dim": 16,
        "is_decoder": True,
    },
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 4,
        **MAMBA_HEADS,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "hybrid_layer_ids": [1],
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "adapter_rank": 4,
        "num_query_groups": 4,
        **MAMBA_HEADS,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_model(family: str, folder: Path) -> None:
    """Save a random model of a family, and a tokenizer of words. Raises what the classes of the family raise."""
    config = CONFIG_MAPPING[family](**tiny_config(family))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters are left")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # so that tokens differ, and what a layer does shows in the logits
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(6.0 if any(part in name for part in ("embed", "wte", "lm_head")) else 3.0)
        embeddings = model.get_input_embeddings().weight
        embeddings[0] = embeddings[3].flip(0)  # the pad token's zeros would have a norm's gradient without bound
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with at most one token for each byte, which the tokenizer classes of all families can read."""
    model = Tokenizer(BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(names.values()), initial_alphabet=alphabet)
    model.train_from_iterator([f"w{number} w{number + 1}" for number in range(40)] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, **names, model_max_length=256)


def tiny_config(family: str) -> dict[str, Any]:
    """Return the shrunk settings of a family's config class."""
    settings = _shrunk(CONFIG_MAPPING[family]().to_dict())
    settings = {name: value for name, value in settings.items() if value is not None and name != "model_type"}
    _merge(settings, EXCEPTIONS.get(family, {}))
    for name in ("transformers_version", "dtype", "torch_dtype"):
        settings.pop(name, None)
    return {**settings, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}


def _shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    """Return small sizes, with one layer of each kind."""
    layers = next((settings[name] for name in LAYERS if isinstance(settings.get(name), int)), 0)
    chosen = _one_of_each(settings.get("layer_types") or settings.get("layers_block_type") or [])
    small: dict[str, Any] = {}
    positions = settings.get("max_position_embeddings")
    for name, value in settings.items():
        if name == "per_layer_config":
            continue
        if isinstance(value, dict):
            small[name] = _shrunk(value) if name.endswith("config") else value
        elif isinstance(value, list) and chosen and len(value) == layers:
            small[name] = [value[index] for index in chosen]
        elif name in LAYERS and chosen:
            small[name] = len(chosen)
        elif name in SMALL and type(value) is int:
            is_left = name not in WINDOWS.split() or value != positions  # a window of all positions stays one
            small[name] = SMALL[name if is_left else "max_position_embeddings"]
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= VOCABULARY:
            small[name] = VOCABULARY - 1 if any(part in name for part in ("image", "audio", "video")) else None
        else:
            small[name] = value
    return small


def _one_of_each(kinds: list[str]) -> list[int]:
    """Return the index of the first layer of each kind, or two layers if there is one kind."""
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    return firsts if len(firsts) != 1 else [0, min(1, len(kinds) - 1)]


def _merge(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(settings.get(name), dict) and name.endswith("config"):
            _merge(settings[name], value)
        else:
            settings[name] = value
