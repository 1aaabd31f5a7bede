"""A Hugging Face folder's weights: names of any age, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.export import write_weights
from megavlm.checkpoint.hf.folder import WeightFolder
from megavlm.checkpoint.hf.links import Link, disk_name, links, part_sizes
from megavlm.checkpoint.hf.load import hf_provider
from megavlm.config.schema import ModelConfig
from megavlm.testing.tiny import tiny_model_config


def weights_of(model: ModelConfig) -> dict[str, torch.Tensor]:
    """Random Hugging Face weights of a model, made from the links alone (shapes of plain ones do not matter here)."""
    found = {}
    for link in links(model):
        sizes = part_sizes(link, model) or [link.rows or 7] * len(link.names)
        for name, rows in zip(link.names, sizes, strict=True):
            found[name] = torch.randn(link.shape or (rows, 48))
    return found


def test_names_of_every_age_become_those_of_today() -> None:
    layer = "layers.0.self_attn.q_proj.weight"
    assert disk_name(f"model.language_model.{layer}") == f"language_model.model.{layer}"
    assert disk_name("lm_head.weight") == "language_model.lm_head.weight"
    assert disk_name("model.vision_tower.vision_model.post_layernorm.bias") == "vision_tower.post_layernorm.bias"
    assert disk_name("vision_tower.vision_model.post_layernorm.bias") == "vision_tower.post_layernorm.bias"
    assert disk_name("model.multi_modal_projector.linear_1.bias") == "multi_modal_projector.linear_1.bias"
    assert disk_name("vision_tower.vision_model.embeddings.position_ids") is None
    assert disk_name("language_model.model.rotary_emb.inv_freq") is None


@pytest.mark.parametrize("link", [link for link in links(tiny_model_config(qkv_bias=True)) if link.kind != "plain"], ids=lambda x: x.key)
def test_links_invert(link: Link) -> None:
    model = tiny_model_config(qkv_bias=True)
    sizes = part_sizes(link, model)
    parts = [torch.randn(*(link.shape or (n, 48))) for n in sizes or [1]]
    back = link.to_theirs(link.to_ours(parts), sizes)
    assert all(torch.equal(a, b) for a, b in zip(parts, back, strict=True))


def test_query_heads_of_a_group_come_before_its_key_and_value() -> None:
    link = Link("k", ("q", "k", "v"), "qkv", groups=2)
    query, key, value = (torch.arange(n) + base for n, base in ((4, 0), (2, 10), (2, 20)))
    assert link.to_ours([query, key, value]).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_missing_and_unknown_weights_are_named(tmp_path: Path) -> None:
    model = tiny_model_config()
    weights = weights_of(model)
    del weights["multi_modal_projector.linear_1.bias"]
    save_file(weights | {"language_model.model.layers.9.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(HuggingFaceError, match=r"lacks multi_modal_projector\.linear_1\.bias and holds unknown weights .*layers\.9\.x"):
        hf_provider(tmp_path, model)


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    model = tiny_model_config(tie_embeddings=True)
    weights = weights_of(model)
    embedding = weights["language_model.model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    hf_provider(tmp_path, model)
    save_file(weights | {"lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(HuggingFaceError, match="differs from the embedding"):
        hf_provider(tmp_path, model)


def test_another_head_count_is_not_cut_in_the_wrong_place(tmp_path: Path) -> None:
    weights = weights_of(tiny_model_config(num_query_groups=4))
    save_file(weights, tmp_path / "model.safetensors")
    provide = hf_provider(tmp_path, tiny_model_config(num_query_groups=2))
    with pytest.raises(HuggingFaceError, match=r"k_proj\.weight has shape \(48, 48\).*wants \(24, 48\)"):
        provide("language.decoder.layers.0.self_attention.linear_qkv.weight", (96, 48))


def test_shards_and_index_are_read_back(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(10, 10) for i in range(7)}
    written = write_weights(iter(tensors.items()), tmp_path, max_shard_bytes=1000)
    assert (written.num_tensors, written.num_parameters, written.dtype) == (7, 700, "float32")
    assert len(list(tmp_path.glob("model-*-of-00004.safetensors"))) == 4
    with WeightFolder(tmp_path) as folder:
        assert folder.names == set(tensors)
        assert all(torch.equal(folder.tensor(n), t) and folder.dtype(n) == t.dtype for n, t in tensors.items())


def test_incomplete_and_damaged_folders(tmp_path: Path) -> None:
    with pytest.raises(HuggingFaceError, match=r"neither model\.safetensors nor"):
        WeightFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(HuggingFaceError, match="pickles, which can run code"):
        WeightFolder(tmp_path)
    write_weights(iter({f"t{i}": torch.randn(10, 10) for i in range(4)}.items()), tmp_path, max_shard_bytes=1000)
    second = tmp_path / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-50])
    with pytest.raises(HuggingFaceError, match="00002-of-00002.safetensors is damaged"):
        WeightFolder(tmp_path)
    second.unlink()
    with pytest.raises(HuggingFaceError, match="is missing, though model.safetensors.index.json names it"):
        WeightFolder(tmp_path)
    save_file({"t2": torch.zeros(1)}, second)
    with pytest.raises(HuggingFaceError, match="lacks t3"):
        WeightFolder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(HuggingFaceError, match="is missing"):
        WeightFolder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(HuggingFaceError, match="index.json is damaged"):
        WeightFolder(tmp_path)
