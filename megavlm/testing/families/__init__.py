"""All cases, family by family; the rows of docs/families.md."""

from megavlm.testing.families import causal_lm, idefics, llava
from megavlm.testing.families.case import Case

CASES: list[Case] = [*llava.CASES, *causal_lm.CASES, *idefics.CASES]
