"""The config of an imported model comes out as it came in, but for what was changed since."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import transformers
from transformers import PretrainedConfig

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf import TokenIds, config_to_hf
from megavlm.checkpoint.hf.config import hf_config
from megavlm.testing.tiny import tiny_model_config

IDS = TokenIds(image=3, bos=1, eos=2, pad=0)


def base() -> dict[str, Any]:
    """As published: settings that training here has no use for differ from what we would write."""
    config = config_to_hf(tiny_model_config(), IDS)
    config |= {"image_seq_length": 999, "somebodys_field": 5, "architectures": ["Somebodys"]}
    config["text_config"] |= {"attention_dropout": 0.25, "use_cache": False}
    config["vision_config"] |= {"attention_dropout": 0.5}
    return config


def test_what_was_not_changed_is_kept() -> None:
    came = hf_config(base()).to_dict()
    went = hf_config(config_to_hf(tiny_model_config(), IDS, base=base())).to_dict()
    assert went.pop("architectures") == ["LlavaForConditionalGeneration"] and came.pop("architectures")
    assert went == came
    assert went["image_seq_length"] == 999
    assert (went["text_config"]["attention_dropout"], went["vision_config"]["attention_dropout"]) == (0.25, 0.5)


def test_nothing_is_added_to_what_is_kept() -> None:
    """Defaults of transformers' config classes that the file does not write out stay out of it."""
    stored = base()
    went = config_to_hf(tiny_model_config(), IDS, base=stored)
    assert went.keys() == stored.keys()
    for block in ("text_config", "vision_config"):
        assert went[block].keys() - stored[block].keys() <= hf_config(stored).to_dict()[block].keys() - PretrainedConfig().to_dict().keys()
        assert went[block]["model_type"] == stored[block]["model_type"]
    assert went["transformers_version"] == transformers.__version__


def test_only_what_was_changed_is_written() -> None:
    model = tiny_model_config()
    rows = model.language.vocab_size + 64
    larger = model.model_copy(update={"language": model.language.model_copy(update={"vocab_size": rows})})
    went = config_to_hf(larger, replace(IDS, image=5), base=base())
    assert went["text_config"]["vocab_size"] == larger.language.num_tokens > model.language.num_tokens
    assert went["image_token_index"] == 5
    assert (went["image_seq_length"], went["text_config"]["attention_dropout"], went["somebodys_field"]) == (999, 0.25, 5)


def test_what_the_class_cannot_hold_is_still_refused() -> None:
    model = tiny_model_config()
    other = model.model_copy(update={"language": model.language.model_copy(update={"activation": "gelu"})})
    with pytest.raises(HuggingFaceError, match=r"language\.activation|hidden_act"):
        config_to_hf(other, IDS, base=base())
