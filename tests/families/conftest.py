"""Each case's Hugging Face model is made once and serves all its proofs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megavlm.checkpoint.hf import config_from_hf
from megavlm.config.schema import ModelConfig
from megavlm.data.prompt import Prompt
from megavlm.testing.families import CASES
from megavlm.testing.families.case import Case, image_token_of, make_hf, prompts_of


@dataclass
class Oracle:
    case: Case
    folder: Path
    hf: Any
    model: ModelConfig
    prompts: list[Prompt]
    image_token: int
    """-1 for a text-only model."""


@pytest.fixture(scope="session", params=[pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.slow else []) for c in CASES])
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    case: Case = request.param
    folder = tmp_path_factory.mktemp("family") / "hf"
    hf = make_hf(case, folder)
    model, token = config_from_hf(folder), image_token_of(case, hf.config)
    return Oracle(case, folder, hf, model, prompts_of(case, model, token), -1 if token is None else token)


RESULTS: dict[str, dict[str, float]] = {}
"""Case -> proof -> what was measured."""
Record = Callable[[str, float], None]


@pytest.fixture
def record(oracle: Oracle) -> Record:
    """Write down (name of the proof, what was measured) for docs/families.md."""
    return lambda proof, value: RESULTS.setdefault(oracle.case.name, {}).update({proof: value})


def pytest_sessionfinish(session: pytest.Session) -> None:
    """`make families` asks for the results by this variable."""
    target = os.environ.get("MEGAVLM_FAMILIES_RESULTS")
    if target:
        Path(target).write_text(json.dumps(RESULTS, indent=1) + "\n", encoding="utf-8")
