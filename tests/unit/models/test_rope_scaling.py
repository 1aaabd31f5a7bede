"""Scaled rotary positions against transformers' rotary modules, with the settings of real models."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, Phi3Config, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from megavlm.checkpoint.hf.language import language
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import LanguageConfig, RopeScaling
from megavlm.models.language.rotary import rotary_tables

SIZES = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64, "num_hidden_layers": 1}
FACTORS = [1.0 + 0.05 * i for i in range(48)]


def llama(longest: int, **rope: Any) -> tuple[Any, Any]:
    config = LlamaConfig(**SIZES, max_position_embeddings=longest, rope_parameters={"rope_theta": 500000.0, **rope})
    return config, LlamaRotaryEmbedding(config)


def qwen(longest: int, **rope: Any) -> tuple[Any, Any]:
    config = Qwen2Config(**SIZES, max_position_embeddings=longest, rope_parameters={"rope_theta": 1000000.0, **rope})
    return config, Qwen2RotaryEmbedding(config)


def phi(longest: int, original: int, **rope: Any) -> tuple[Any, Any]:
    rope = {"rope_theta": 10000.0, "rope_type": "longrope", "partial_rotary_factor": 0.75, **rope}
    config = Phi3Config(**SIZES, max_position_embeddings=longest, original_max_position_embeddings=original, rope_parameters=rope)
    return config, Phi3RotaryEmbedding(config)


CASES = {
    "plain": lambda: llama(4096, rope_type="default"),
    "Vicuna 16k": lambda: llama(4096, rope_type="linear", factor=4.0),
    "InternLM2": lambda: llama(300, rope_type="dynamic", factor=2.0),
    "Llama 3.1": lambda: llama(
        131072, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
    "Qwen2.5 long": lambda: qwen(32768, rope_type="yarn", factor=4.0, original_max_position_embeddings=32768),
    "YaRN with everything": lambda: qwen(
        4096,
        rope_type="yarn",
        factor=16.0,
        original_max_position_embeddings=256,
        beta_fast=24.0,
        beta_slow=2.0,
        mscale=1.0,
        mscale_all_dim=0.8,
        truncate=False,
    ),
    "Phi-3 long": lambda: phi(131072, 400, short_factor=FACTORS, long_factor=FACTORS[::-1]),
    "Phi-3 long, given factor": lambda: phi(4096, 400, short_factor=FACTORS, long_factor=FACTORS[::-1], attention_factor=1.19),
}


@pytest.mark.parametrize("name", CASES)
def test_tables_of_a_pack_are_those_of_its_samples(name):
    config, rotary = CASES[name]()
    problems = Problems()
    ours = LanguageConfig(**language(config.model_type).from_hf(config, problems))
    assert not problems.found
    lengths = [7, 1000, 350, 401]
    expected = []
    for length in lengths:
        fresh = type(rotary)(config)  # dynamic scaling remembers the longest sequence so far
        cos, sin = fresh(torch.zeros(1), torch.arange(length)[None])
        expected.append((cos[0], sin[0]))
    got = rotary_tables(ours, torch.cat([torch.arange(n) for n in lengths]), torch.float32, lengths)["global"]
    for table, theirs in zip(got, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(table, torch.cat(theirs), atol=2e-5, rtol=0)


def test_the_last_token_alone_is_rotated_as_in_its_whole_sequence():
    config, _ = CASES["Phi-3 long"]()
    ours = LanguageConfig(**language("phi3").from_hf(config, Problems()))
    whole = rotary_tables(ours, torch.arange(450), torch.float32)["global"][0]
    last = rotary_tables(ours, torch.tensor([449, 2]), torch.float32, [1, 1])["global"][0]
    assert torch.equal(whole[449], last[0])
    assert not torch.equal(whole[2], last[1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "llama3", "parameters": {"factor": 8.0}}, "lacks high_freq_factor, low_freq_factor, original_max"),
        ({"kind": "linear", "parameters": {"factor": 2.0, "beta_fast": 3}}, "does not know beta_fast"),
        ({"kind": "linear", "parameters": {"factor": [2.0]}}, "must be a number"),
    ],
)
def test_wrong_parameters_are_named(values, message):
    with pytest.raises(ValidationError, match=message):
        RopeScaling.model_validate(values)


def test_factors_must_fit_the_heads():
    parameters = {"short_factor": [1.0], "long_factor": [1.0], "original_max_position_embeddings": 8}
    with pytest.raises(ValidationError, match="1 factors for 64 rotation pairs"):
        LanguageConfig(rope_scaling={"kind": "longrope", "parameters": parameters})
