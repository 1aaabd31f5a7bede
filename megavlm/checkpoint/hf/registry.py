"""All families, and which one a folder or a model block belongs to."""

from __future__ import annotations

from pathlib import Path

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.families.base import Family
from megavlm.checkpoint.hf.families.blip_2 import Blip2
from megavlm.checkpoint.hf.families.causal_lm import CausalLM
from megavlm.checkpoint.hf.families.gemma3 import Gemma3
from megavlm.checkpoint.hf.families.idefics2 import Idefics2
from megavlm.checkpoint.hf.families.idefics3 import Idefics3
from megavlm.checkpoint.hf.families.instructblip import InstructBlip
from megavlm.checkpoint.hf.families.internlm2 import InternLM2
from megavlm.checkpoint.hf.families.internvl import InternVL
from megavlm.checkpoint.hf.families.llava import Llava
from megavlm.checkpoint.hf.families.llava_next import LlavaNext
from megavlm.checkpoint.hf.families.llava_onevision import LlavaOnevision
from megavlm.checkpoint.hf.families.mistral3 import Mistral3
from megavlm.checkpoint.hf.families.mllama import Mllama
from megavlm.checkpoint.hf.families.paligemma import PaliGemma
from megavlm.checkpoint.hf.families.pixtral import Pixtral
from megavlm.checkpoint.hf.families.qwen2_5_vl import Qwen25VL
from megavlm.checkpoint.hf.families.qwen2_vl import Qwen2VL
from megavlm.checkpoint.hf.families.qwen3_vl import Qwen3VL
from megavlm.checkpoint.hf.families.smolvlm import SmolVLM
from megavlm.checkpoint.hf.families.vipllava import VipLlava
from megavlm.checkpoint.hf.reading import CONFIG, read_json

# Pixtral before LLaVA: its folders have the same model_type.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Pixtral(),
        Llava(),
        LlavaNext(),
        LlavaOnevision(),
        VipLlava(),
        InternVL(),
        CausalLM(),
        InternLM2(),
        Idefics2(),
        Idefics3(),
        SmolVLM(),
        Mistral3(),
        Mllama(),
        Qwen2VL(),
        Qwen25VL(),
        Qwen3VL(),
        PaliGemma(),
        Gemma3(),
        Blip2(),
        InstructBlip(),
    )
}


def family(name: str) -> Family:
    """By `model.family`. Raises HuggingFaceError."""
    if name not in FAMILIES:
        raise HuggingFaceError(f"model.family={name!r} is not known: it is one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of_folder(folder: str | Path) -> Family:
    """By the folder's config.json. Raises HuggingFaceError when there is none, or no family for it."""
    file = Path(folder) / CONFIG
    values = read_json(file)
    for candidate in FAMILIES.values():
        if candidate.handles(values):
            return candidate
    raise HuggingFaceError(
        f"{file}: model_type={values.get('model_type')!r} is none of the families here: {', '.join(FAMILIES)} (docs/families.md)"
    )
