"""Quantized bases: what their layers compute, who shares them, and that a merged model equals the trained one."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, Gemma2Config, LlamaConfig

from keel.config import DpoConfig, LoraSettings, RewardConfig, SftConfig, TrainConfig, parse
from keel.errors import ConfigError
from keel.models.adapters import merged_copy
from keel.models.heads import trunk
from keel.models.loading import classifier_on_base, load_causal_lm, load_classifier, load_tokenizer, save_policy
from keel.models.packed import token_states
from keel.models.quantized import LAYERS, Int8Linear, NF4Linear, QuantizedLinear, import_bitsandbytes, quantize_model
from keel.models.reward_model import RewardModel
from keel.models.sameness import probe_logprobs, probe_tokens
from keel.rollout.scorers import RewardModelScorer
from keel.training.setup import TrainingSetup, build_training_setup
from keel.world import ALONE

from ..conftest import save_tiny_model, word_tokenizer
from ..runs import PROMPTS, settings
from ..shapes import SIZES

NEEDED = "needs bitsandbytes: pip install '.[quantization]'"
peft = pytest.importorskip("peft", reason=NEEDED)
pytest.importorskip("bitsandbytes", reason=NEEDED)

KINDS = ["nf4", "int8"]
BOTH = pytest.mark.parametrize("kind", KINDS)
RESPONSES = ["w1", "w2 w3", "w4", "w5 w6 w7"]

# The 16 values of NormalFloat, from appendix E of Dettmers et al. 2023.
NORMAL_FLOAT = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def linear(inputs: int = 96, outputs: int = 64, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


def disturb(model: Any) -> Any:
    """Change the trained weights, as if the model had learned something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def places(model: Any) -> dict[str, int]:
    """Addresses of the frozen tensors of the trunk: packed weights, scales, norms, embeddings."""
    return {
        name.replace(".base_layer.", "."): weight.data_ptr()
        for name, weight in trunk(model).named_parameters()
        if "lora_" not in name
    }


# ---- layers ----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(96, 64, True), (64, 128, False), (33, 31, True)])
def test_a_layer_computes_with_its_dequantized_weights(
    kind: str, dtype: torch.dtype, inputs: int, outputs: int, bias: bool
) -> None:
    layer = linear(inputs, outputs, dtype, bias)
    quantized = LAYERS[kind](layer)
    weight = quantized.dequantize(dtype)
    assert weight.shape == layer.weight.shape
    assert weight.dtype == dtype
    x = torch.randn(2, 3, inputs, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    products = [quantized(x), nn.functional.linear(x, weight, layer.bias)]
    gradients = [torch.autograd.grad(product.float().square().sum(), x)[0] for product in products]
    exact = {"rtol": 1e-6, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(products[0], products[1], **exact)
    torch.testing.assert_close(gradients[0], gradients[1], **exact)
    with torch.no_grad():
        torch.testing.assert_close(quantized(x), products[0], **exact)


def test_a_gradient_after_passes_without_one(tiny_policy: Path) -> None:
    """Layers of bitsandbytes lose theirs on some CPUs, since they repack the weights in such a pass."""
    quantized = NF4Linear(linear(dtype=torch.bfloat16)).eval()
    x = torch.ones(1, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        quantized(x)
    x.requires_grad_()
    quantized(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], quantized.dequantize(torch.bfloat16).sum(0), atol=0.05, rtol=0.05)


def test_nf4_takes_the_nearest_value_of_normal_float_in_each_block() -> None:
    layer = linear(128, 64, bias=False)
    blocks = layer.weight.view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NORMAL_FLOAT)
    nearest = levels[(blocks / scales).unsqueeze(-1).sub(levels).abs().argmin(-1)] * scales
    found = NF4Linear(layer).dequantize(torch.float32).view(-1, 64)
    torch.testing.assert_close(found, nearest, atol=0.02 * float(scales.max()), rtol=0)  # the scales have 8 bits
    assert (found - nearest).abs().mean() < 0.005 * nearest.abs().mean()


def test_int8_rounds_to_127_steps_of_a_row() -> None:
    layer = linear()
    steps = layer.weight.abs().amax(1, keepdim=True) / 127
    found = Int8Linear(layer).dequantize(torch.float32)
    # bitsandbytes rounds the weights to float16 first, which moves the limits between steps a little.
    assert ((found - layer.weight).abs() <= 0.54 * steps).all()
    torch.testing.assert_close(found / steps, (found / steps).round(), atol=0.05, rtol=0)


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.13), ("int8", 8.0625)])
def test_bits_of_a_weight(kind: str, bits: float) -> None:
    quantized = LAYERS[kind](linear(512, 512, bias=False))
    size = sum(weight.numel() * weight.dtype.itemsize for weight in quantized.parameters())
    assert 8 * size / 512**2 == pytest.approx(bits, abs=0.005)


# ---- models ----------------------------------------------------------------------------------------------------------


@BOTH
def test_the_linear_layers_of_the_trunk_are_quantized_and_nothing_else(kind: str, tiny_policy: Path) -> None:
    base = load_causal_lm(str(tiny_policy), "bfloat16")
    model = load_causal_lm(str(tiny_policy), "bfloat16", LoraSettings(r=2), kind)
    layers = {name for name, layer in base.model.named_modules() if isinstance(layer, nn.Linear)}
    quantized = {
        name.removesuffix(".base_layer")
        for name, layer in trunk(model).named_modules()
        if isinstance(layer, QuantizedLinear)
    }
    assert quantized == layers
    others = {name: weight for name, weight in base.named_parameters() if name.rpartition(".")[0][6:] not in layers}
    found = dict(model.get_base_model().named_parameters())
    assert others.keys() == {"model.embed_tokens.weight", "lm_head.weight"} | {key for key in others if "norm" in key}
    assert all(torch.equal(found[name], weight) for name, weight in others.items())
    assert all(weight.dtype is torch.float32 for weight in model.parameters() if weight.requires_grad)


@BOTH
def test_the_states_are_those_of_the_dequantized_model(kind: str, tiny_policy: Path) -> None:
    model = disturb(load_causal_lm(str(tiny_policy), lora=LoraSettings(r=2), quantization=kind))
    merged = merged_copy(model)
    tokens = probe_tokens(model)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(
            token_states(model, tokens, mask), token_states(merged, tokens, mask), atol=1e-4, rtol=1e-4
        )
    assert not hasattr(merged.config, "keel_quantization")
    assert any(isinstance(layer, QuantizedLinear) for layer in model.modules())  # the model itself did not change


@BOTH
def test_a_model_whose_layers_are_not_known_is_quantized_too(kind: str, tmp_path: Path) -> None:
    config = Gemma2Config(**SIZES | {"vocab_size": 32}, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    folder = save_tiny_model(config, "<pad>", tmp_path / "gemma")
    model = disturb(load_causal_lm(str(folder), lora=LoraSettings(r=2), quantization=kind))
    tokens = probe_tokens(model)
    torch.testing.assert_close(
        probe_logprobs(model, tokens), probe_logprobs(merged_copy(model), tokens), atol=1e-4, rtol=1e-4
    )
    critic = classifier_on_base(model)
    assert places(critic) == places(model)


# ---- one base for all ------------------------------------------------------------------------------------------------


def setup_of(policy: Path, tmp_path: Path, **changes: Any) -> TrainingSetup:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    given = {"prompts.path": str(prompts), "policy.lora": {"r": 2}, "policy.quantization": "nf4", **changes}
    config = parse(TrainConfig, settings(policy, tmp_path / "run", given))
    return build_training_setup(config, [], None, ALONE, scores_required=False)


@BOTH
def test_policy_reference_critic_and_reward_model_share_one_quantized_base(
    kind: str, tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = RewardModel.load(
        str(tiny_policy), template="{prompt} {response}", lora=LoraSettings(r=2), quantization=kind
    )
    disturb(reward.model)
    reward.save(tmp_path / "reward")

    def read_again(*_: Any, **__: Any) -> None:
        raise AssertionError("the critic's base is read again")

    monkeypatch.setattr("keel.training.critic.load_classifier", read_again)
    rewards = [{"model": str(tmp_path / "reward" / "adapter")}]
    setup = setup_of(tiny_policy, tmp_path, **{"rewards": rewards, "policy.quantization": kind})
    policy, reference = setup.actor_critic.policy, setup.reference
    [scorer] = setup.scorers
    assert isinstance(scorer, RewardModelScorer)
    assert reference is not None
    assert reference.policy is policy
    assert any(name.endswith("q_proj.scales") for name in places(policy))
    assert places(setup.actor_critic.critic) == places(policy)
    assert places(scorer.members[0].model) == places(policy)
    torch.testing.assert_close(scorer.members[0].score(PROMPTS, RESPONSES), reward.score(PROMPTS, RESPONSES))


def test_a_critic_on_another_base_has_a_separate_quantized_one(tiny_policy: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(tiny_policy).config)
    model.save_pretrained(tmp_path / "other")
    load_tokenizer(str(tiny_policy)).save_pretrained(tmp_path / "other")
    setup = setup_of(tiny_policy, tmp_path, **{"critic.init": str(tmp_path / "other")})
    critic, policy = places(setup.actor_critic.critic), places(setup.actor_critic.policy)
    assert critic.keys() == policy.keys()
    packed = [name for name in critic if name.endswith("_proj.weight")]
    assert packed
    assert not any(critic[name] == policy[name] for name in packed)


def test_an_adapter_of_an_unquantized_base_keeps_that_base(tiny_policy: Path, tmp_path: Path) -> None:
    reward = RewardModel.load(str(tiny_policy), template="{prompt} {response}", lora=LoraSettings(r=2))
    disturb(reward.model)
    reward.save(tmp_path / "reward")
    setup = setup_of(tiny_policy, tmp_path, rewards=[{"model": str(tmp_path / "reward" / "adapter")}])
    [scorer] = setup.scorers
    assert isinstance(scorer, RewardModelScorer)
    torch.testing.assert_close(scorer.members[0].score(PROMPTS, RESPONSES), reward.score(PROMPTS, RESPONSES))


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_critic_on_the_base_in_memory_equals_one_from_the_file(quantization: str | None, tiny_policy: Path) -> None:
    policy = disturb(load_causal_lm(str(tiny_policy), lora=LoraSettings(r=2), quantization=quantization))
    critic: Any = classifier_on_base(policy)
    read = load_classifier(str(tiny_policy), to_train=True)
    assert type(critic) is type(read)
    assert critic.config.num_labels == 1
    assert not critic.score.weight.any()
    assert not any("lora" in name for name, _ in critic.named_parameters())
    tokens = probe_tokens(policy)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad(), policy.disable_adapter():
        expected = token_states(policy if quantization else read, tokens, mask)
        torch.testing.assert_close(token_states(critic, tokens, mask), expected, atol=0, rtol=0)


# ---- what is saved ---------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_result_is_plain_and_equals_what_was_trained(
    kind: str, dtype: str, tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = disturb(load_causal_lm(str(tiny_policy), dtype, LoraSettings(r=2), kind))
    save_policy(model, load_tokenizer(str(tiny_policy)), tmp_path / "policy")  # compares both results with the model
    assert f"the adapter is merged into the {kind} base, dequantized to {dtype}" in capsys.readouterr().err
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert not any("quantization" in key for key in config)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=dtype)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    pair = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    weight = layer.base_layer.dequantize(saved.dtype) + 32 / 2 * pair  # alpha / r
    exact = {"atol": 1e-6, "rtol": 0.0} if dtype == "float32" else {"atol": 1e-3, "rtol": 1e-2}
    torch.testing.assert_close(saved.model.layers[0].self_attn.q_proj.weight.float(), weight.float(), **exact)


@BOTH
def test_an_adapter_names_its_base_and_fits_it_with_and_without_quantization(
    kind: str, tiny_policy: Path, tmp_path: Path
) -> None:
    model = disturb(load_causal_lm(str(tiny_policy), lora=LoraSettings(r=2), quantization=kind))
    save_policy(model, load_tokenizer(str(tiny_policy)), tmp_path / "policy")
    adapter = tmp_path / "policy" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_policy)
    assert json.loads((adapter / "config.json").read_text())["keel_quantization"] == kind
    tokens = probe_tokens(model)
    trained = probe_logprobs(model, tokens)
    again = load_causal_lm(str(adapter))  # on the quantized base, as in training, and merged
    torch.testing.assert_close(probe_logprobs(again, tokens), trained, atol=1e-4, rtol=1e-4)
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_policy), adapter).eval()
    assert all(
        torch.equal(weight, dict(plain.named_parameters())[name])
        for name, weight in model.named_parameters()
        if "lora_" in name
    )


@BOTH
def test_a_new_layer_below_a_head_is_trained_in_full_and_not_quantized(kind: str, tmp_path: Path) -> None:
    sizes = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = BertConfig(**sizes, num_attention_heads=2, vocab_size=32, pad_token_id=0, num_labels=1)
    encoder: Any = BertForSequenceClassification(config).bert
    encoder.pooler = None
    encoder.save_pretrained(tmp_path / "encoder")
    word_tokenizer("<pad>").save_pretrained(tmp_path / "encoder")
    model = RewardModel.load(
        str(tmp_path / "encoder"), template="{prompt} {response}", lora=LoraSettings(r=2), quantization=kind
    )
    trained = {name for name, weight in model.model.named_parameters() if weight.requires_grad and "lora" not in name}
    assert any("pooler.dense" in name for name in trained)
    disturb(model.model)
    model.save(tmp_path / "reward")  # compares both results with the model
    scores = model.score(PROMPTS, RESPONSES)
    for place in (tmp_path / "reward", tmp_path / "reward" / "adapter"):
        torch.testing.assert_close(RewardModel.load(str(place)).score(PROMPTS, RESPONSES), scores, atol=1e-4, rtol=0)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings_class", [SftConfig, RewardConfig, DpoConfig])
def test_quantized_weights_without_an_adapter_are_refused(settings_class: Any) -> None:
    given = {"output": "runs/a", "model": "m", "data": {"path": "rows.jsonl"}, "quantization": "nf4"}
    with pytest.raises(ConfigError, match=r"quantization nf4 needs lora; set lora\.r, or remove quantization"):
        parse(settings_class, given)
    parse(settings_class, given | {"lora": {}})


def test_a_quantized_policy_without_an_adapter_is_refused(tmp_path: Path) -> None:
    given = settings(tmp_path, tmp_path / "run", {"policy.quantization": "int8"})
    with pytest.raises(ConfigError, match="policy: quantization int8 needs lora"):
        parse(TrainConfig, given)


def test_without_bitsandbytes_the_extra_is_named(tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for load in (load_causal_lm, RewardModel.load):
        with pytest.raises(ConfigError, match="needs the package bitsandbytes") as caught:
            load(str(tiny_policy), lora=LoraSettings(r=2), quantization="nf4")
        assert caught.value.where == "quantization"
        assert "keel-rlhf[quantization]" in str(caught.value.fix)


def test_a_model_without_linear_layers_is_refused(tiny_gpt2: Path) -> None:
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has no linear layers that can be quantized"):
        load_causal_lm(str(tiny_gpt2), lora=LoraSettings(r=2), quantization="nf4")


class ReadsWeights(nn.Module):
    """A layer's stand-in that uses the weights of the layer inside, as some architectures do."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.layer.weight.T


@BOTH
def test_a_model_that_reads_weights_of_its_layers_is_refused(kind: str, tiny_policy: Path) -> None:
    model = load_causal_lm(str(tiny_policy))
    model.model.__class__ = type("OtherModel", (type(model.model),), {})  # its layers are not known
    model.model.layers[1].mlp.up_proj = ReadsWeights(model.model.layers[1].mlp.up_proj)
    with pytest.raises(ConfigError, match="LlamaForCausalLM does not compute with quantized layers"):
        quantize_model(model, kind)


def test_a_folder_with_quantized_weights_is_refused(tiny_policy: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(tiny_policy)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    for load in (load_causal_lm, load_classifier):
        with pytest.raises(ConfigError, match=r"weights in these files are quantized \(bitsandbytes\)") as caught:
            load(str(tmp_path))
        assert caught.value.where == str(tmp_path)
