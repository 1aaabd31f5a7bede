"""Language models of transformers, one small class each."""

from __future__ import annotations

from typing import Any

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.holding import which_holds
from megavlm.checkpoint.hf.language.base import LanguageKind
from megavlm.checkpoint.hf.language.gemma import Gemma, Gemma2, Gemma3Text
from megavlm.checkpoint.hf.language.llama import Llama, Mistral, Qwen2, Qwen3
from megavlm.checkpoint.hf.language.moe import Mixtral, Qwen3Moe
from megavlm.checkpoint.hf.language.opt import Opt
from megavlm.checkpoint.hf.language.phi3 import Phi3
from megavlm.checkpoint.hf.reading import Problems, hf_config
from megavlm.config.schema import LanguageConfig

LANGUAGES: dict[str, LanguageKind] = {
    kind.model_type: kind
    for kind in (Llama(), Qwen2(), Qwen3(), Opt(), Qwen3Moe(), Mixtral(), Mistral(), Phi3(), Gemma(), Gemma2(), Gemma3Text())
}


def language(model_type: str, allowed: tuple[str, ...] | None = None) -> LanguageKind:
    """The model of a text config's model_type. Raises HuggingFaceError when there is none (or none that the family takes)."""
    names = allowed or tuple(LANGUAGES)
    if model_type not in names:
        raise HuggingFaceError(f"text_config.model_type is {model_type!r}, supported: {', '.join(names)}")
    return LANGUAGES[model_type]


def language_of(config: LanguageConfig, allowed: tuple[str, ...] | None = None) -> LanguageKind:
    """The transformers class that can hold this LLM: the one it came from, else the first of those that can.

    Raises:
        HuggingFaceError: none can; with what the nearest class would lose.
    """
    names = allowed or tuple(LANGUAGES)
    kinds = [LANGUAGES[name] for name in sorted(names, key=lambda name: name != config.family)]

    def back(kind: LanguageKind) -> dict[str, Any]:
        problems = Problems()
        fields = kind.from_hf(hf_config(kind.to_hf(config)), problems)
        problems.check("model.language")
        return canonical(LanguageConfig(**fields))

    return which_holds("model.language", canonical(config), {kind.model_type: kind for kind in kinds}, back)


def canonical(config: LanguageConfig) -> dict[str, Any]:
    """The block with every value that follows from others written out, so that equal models have equal blocks."""
    values = config.model_dump(exclude={"family"}) | {"num_query_groups": config.kv_heads, "head_dim": config.head_width}
    if config.moe is not None:
        # How experts are balanced in training is no property of the network.
        values["moe"] = {name: value for name, value in values["moe"].items() if name != "aux_loss"}
    if not config.sliding_layers:
        values["sliding_window_tokens"] = None
    if not config.sliding_layers or (config.rope_scaling is None and config.rope_local_theta == config.rope_theta):
        values["rope_local_theta"] = None
    if config.attention_scale is not None and abs(config.attention_scale - config.head_width**-0.5) < 1e-12:
        values["attention_scale"] = None
    return values
