"""All cases, family by family; the rows of docs/families.md."""

from megavlm.testing.families import (
    blip,
    causal_lm,
    gemma,
    gemma3,
    idefics,
    internvl,
    llava,
    llava_next,
    mllama,
    moe,
    paligemma,
    pixtral,
    qwen_vl,
)
from megavlm.testing.families.case import Case

CASES: list[Case] = [
    *llava.CASES,
    *llava_next.CASES,
    *internvl.CASES,
    *blip.CASES,
    *causal_lm.CASES,
    *gemma.CASES,
    *paligemma.CASES,
    *gemma3.CASES,
    *idefics.CASES,
    *mllama.CASES,
    *moe.CASES,
    *pixtral.CASES,
    *qwen_vl.CASES,
]
