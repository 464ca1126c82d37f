"""Random models in the place of saved ones: their depth, their ends, and that copies of one are alike."""

import json
import shutil
from pathlib import Path

import torch

from keel.config import LoraSettings
from keel.models.adapters import save_adapter, with_lora
from keel.models.heads import trunk
from keel.models.loading import end_token_ids, load_causal_lm, load_classifier, load_tokenizer
from keel.models.shallow import BLOCK, shallow_models


def test_a_name_stands_for_a_random_model_inside_and_for_the_saved_one_outside(tiny_policy: Path) -> None:
    saved, name = load_causal_lm(str(tiny_policy)), str(tiny_policy)
    depth = saved.config.num_hidden_layers + 1
    with shallow_models({name: depth}):
        model, again, critic = load_causal_lm(name), load_causal_lm(name), load_classifier(name, to_train=True)
    assert (len(model.model.layers), len(critic.model.layers)) == (depth, depth)
    embeddings = [each.get_input_embeddings().weight for each in (saved, model, again, load_causal_lm(name))]
    assert not torch.equal(embeddings[0], embeddings[1])
    assert torch.equal(embeddings[1], embeddings[2])
    assert torch.equal(embeddings[0], embeddings[3])


def test_policy_and_critic_of_one_name_have_one_trunk(tiny_policy: Path) -> None:
    """So that with adapters they share it, as a run's do."""
    name = str(tiny_policy)
    with shallow_models({name: 1}):
        one, other = (trunk(load(name)).state_dict() for load in (load_causal_lm, load_classifier))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_an_adapter_is_its_base_and_ends_where_the_base_does(tiny_policy: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_policy, tmp_path / "base"))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    model, tokenizer = load_causal_lm(str(base)), load_tokenizer(str(base))
    save_adapter(with_lora(model, LoraSettings(r=2), "CAUSAL_LM"), tokenizer, tmp_path / "adapter")
    with shallow_models({str(tmp_path / "adapter"): 1}):
        shallow = load_causal_lm(str(tmp_path / "adapter"))
    assert len(shallow.model.layers) == 1
    assert end_token_ids(shallow, tokenizer) == [2, 5]


def test_large_matrices_have_no_two_equal_rows(tiny_policy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_policy, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    rows = 2 * BLOCK // config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    with shallow_models({str(folder): 1}):
        weight = load_causal_lm(str(folder)).get_input_embeddings().weight
    assert len(torch.unique(weight[:, :4], dim=0)) > 0.99 * rows
