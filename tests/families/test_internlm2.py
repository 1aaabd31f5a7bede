"""InternLM2's published layout, whose class is code in its folders: the oracle is a Llama with the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf import config_from_hf, export_hf
from megavlm.checkpoint.hf.importing import import_hf
from megavlm.checkpoint.hf.reading import quiet_transformers
from megavlm.checkpoint.hf.seeded import seeded_prompts
from megavlm.config.schema import ImageConfig
from megavlm.testing.families.case import randomise
from megavlm.testing.families.in_ranks import logits_of_packs
from megavlm.testing.families.parts import text_config
from megavlm.testing.pool import RankPool

NAMES = {
    "model.embed_tokens": "model.tok_embeddings",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "lm_head": "output",
}
ROPE = {"type": "dynamic", "factor": 2.0}


@pytest.fixture(scope="module")
def llama() -> Any:
    tf = quiet_transformers()
    config = text_config(tf, "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5000.0})
    torch.manual_seed(11)
    model = tf.LlamaForCausalLM(config).eval()
    randomise(model, 0.2)
    return model


@pytest.fixture(scope="module")
def folder(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the published folders are: query heads of a group, its key and its value follow each other."""
    path, config, weights = tmp_path_factory.mktemp("internlm2"), llama.config, {}
    for name, tensor in llama.state_dict().items():
        if "self_attn.q_proj" in name:
            q, k, v = (
                llama.state_dict()[name.replace("q_proj", f"{x}_proj")].unflatten(0, (config.num_key_value_heads, -1, 12)) for x in "qkv"
            )
            weights[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat([q, k, v], dim=1).flatten(0, 2).contiguous()
        elif "k_proj" not in name and "v_proj" not in name:
            for theirs, own in NAMES.items():
                name = name.replace(theirs, own)
            weights[name] = tensor.clone()
    save_file(weights, str(path / "model.safetensors"), metadata={"format": "pt"})
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    values = {name: getattr(config, name) for name in (*kept, "max_position_embeddings", "rms_norm_eps", "hidden_act")}
    values |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False, "rope_theta": 5000.0}
    values |= {"auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"}, "rope_scaling": ROPE}
    values |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": False}
    (path / "config.json").write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"pipeline": 2}], ids=["TP1", "TP2", "PP2"])
def test_logits(pool: RankPool, llama: Any, folder: Path, layout: dict[str, Any]) -> None:
    prompts = seeded_prompts(config_from_hf(folder), ImageConfig(), None)
    with torch.no_grad():
        expected = torch.cat([llama(input_ids=torch.tensor([list(prompt.ids)])).logits[0] for prompt in prompts])
    results = pool.run(logits_of_packs, folder, layout, [prompts], -1, world_size=max(layout.values(), default=1))
    for (got,) in [r for r in results if r is not None]:
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_exported_as_a_llama(llama: Any, folder: Path, tmp_path: Path) -> None:
    import_hf(folder, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    again = quiet_transformers().AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert type(again) is type(llama) and again.config.rope_parameters == llama.config.rope_parameters
    weights = load_file(str(tmp_path / "out" / "model.safetensors"))
    assert weights.keys() == llama.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in llama.state_dict().items())


def test_biases_are_refused(folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"bias": True}))
    with pytest.raises(HuggingFaceError, match="bias is True, supported: False"):
        config_from_hf(tmp_path)
