"""Tiny random Hugging Face models, one `Case` each: the oracle of every proof about a family.

Shape legend: L tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megavlm.checkpoint.hf.families.base import Family
from megavlm.checkpoint.hf.reading import quiet_transformers
from megavlm.checkpoint.hf.registry import family
from megavlm.checkpoint.hf.seeded import seeded_prompts
from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.prompt import Prompt


@dataclass(frozen=True)
class Case:
    """One flavour of a family."""

    name: str
    """Shown in docs/families.md."""
    family: str
    config: Callable[[Any], Any]
    """transformers module -> config object of a model of some ten thousand weights."""
    image: dict[str, Any] = field(default_factory=dict)
    """data.image block of the proofs' pictures: the policy that the family's processor has."""
    slow: bool = False
    """A variant that only `make test-all` proves."""
    std: float = 0.2
    """Of the random weights: large, so that mistakes about positions and masks show."""

    @property
    def kind(self) -> Family:
        return family(self.family)


def make_hf(case: Case, folder: Path, *, dtype: torch.dtype = torch.float32, **save: Any) -> Any:
    """Write the case's model with large random weights to `folder`, and return it. `save` are options of save_pretrained."""
    tf = quiet_transformers()
    tf.utils.logging.disable_progress_bar()
    config = case.config(tf)
    cls = getattr(tf, case.kind.hf_class)
    torch.manual_seed(11)
    build = cls.from_config if case.kind.hf_class.startswith("Auto") else cls
    model = build(config).eval()
    randomise(model, case.std)
    model = model.to(dtype)
    model.save_pretrained(str(folder), **save)
    return model


@torch.no_grad()
def randomise(model: torch.nn.Module, std: float) -> None:
    """Every parameter anew, around 1 where it scales (norms) and around 0 elsewhere."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter) * std
        # A parameter that starts as ones is a scale; Gemma's norms start as zeros and add 1.
        scales = parameter.dim() == 1 and name.endswith("weight") and bool((parameter == 1).all())
        parameter.copy_(1 + noise if scales else noise)


def prompts_of(case: Case, model: ModelConfig, image_token: int | None, seed: int = 0) -> list[Prompt]:
    """Text alone, one picture, one of an odd size, several of unequal odd sizes."""
    return seeded_prompts(model, ImageConfig.model_validate(case.image), image_token, seed)


def image_token_of(case: Case, hf_config: Any) -> int | None:
    """Id of the placeholder."""
    return getattr(hf_config, case.kind.image_token_field, None)


@torch.no_grad()
def hf_logits(case: Case, hf: Any, model: ModelConfig, prompts: list[Prompt]) -> list[torch.Tensor]:
    """(L, V) of each prompt, run alone through the Hugging Face model."""
    return [hf(**case.kind.hf_inputs(model, prompt)).logits[0].float() for prompt in prompts]
