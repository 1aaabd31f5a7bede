"""What a recipe may say otherwise than the folder that it starts from: how to train, never what the network is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf import TokenIds, config_from_hf, config_to_hf
from megavlm.checkpoint.hf.starting import complete
from megavlm.config.init import InitConfig
from megavlm.config.schema import ModelConfig
from megavlm.testing.families import CASES
from megavlm.testing.families.case import make_hf

BY_NAME = {case.name: case for case in CASES}


def completed(folder: Path, **language: Any) -> ModelConfig:
    values = complete({"init": {"from_hf": str(folder)}, "model": {"language": language}, "data": {}})
    return ModelConfig.model_validate_json(json.dumps(values["model"]))


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Mixtral"])
def test_a_recipe_switches_balancing_on(tmp_path: Path, name: str) -> None:
    """transformers adds no such loss where the folder does not ask for the router's logits: neither do we, until told to."""
    make_hf(BY_NAME[name], tmp_path)
    base = json.loads((tmp_path / "config.json").read_text())
    assert base["router_aux_loss_coef"] > 0 and not base.get("output_router_logits")
    came = config_from_hf(tmp_path)
    assert came.language.moe is not None and came.language.moe.aux_loss == 0
    model = completed(tmp_path, moe={"aux_loss": 0.02})
    assert model.language.moe is not None and model.language.moe.aux_loss == 0.02
    assert model.language.moe.num_experts == came.language.moe.num_experts
    # The export is the base model's in all that the recipe chose for its training.
    for exported in (config_to_hf(m, TokenIds(), base=base) for m in (came, model)):
        assert exported["router_aux_loss_coef"] == base["router_aux_loss_coef"]
        assert exported["output_router_logits"] is False
    alone = config_to_hf(model, TokenIds())
    assert (alone["router_aux_loss_coef"], alone["output_router_logits"]) == (0.02, True)


def test_a_folder_that_balances_may_be_trained_without(tmp_path: Path) -> None:
    make_hf(BY_NAME["Qwen3-MoE"], tmp_path)
    base = json.loads((tmp_path / "config.json").read_text()) | {"output_router_logits": True, "router_aux_loss_coef": 0.25}
    (tmp_path / "config.json").write_text(json.dumps(base))
    moe = completed(tmp_path).language.moe
    assert moe is not None and moe.aux_loss == 0.25
    model = completed(tmp_path, moe={"aux_loss": 0.0})
    assert model.language.moe is not None and model.language.moe.aux_loss == 0
    assert config_to_hf(model, TokenIds(), base=base)["router_aux_loss_coef"] == 0.25


def test_experts_are_no_choice(tmp_path: Path) -> None:
    make_hf(BY_NAME["Qwen3-MoE"], tmp_path)
    with pytest.raises(HuggingFaceError, match=r"model\.language\.moe=.*the folder has"):
        completed(tmp_path, moe={"top_k": 1})


def test_longer_prompts_are_a_choice_unless_the_network_follows_from_them(tmp_path: Path) -> None:
    make_hf(BY_NAME["LLaVA-1.5"], tmp_path)
    assert completed(tmp_path, max_positions=2048).language.max_positions == 2048
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"]["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5000.0}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(HuggingFaceError, match=r"max_positions=2048 \(the folder has 512\)"):
        completed(tmp_path, max_positions=2048)


def test_a_table_of_positions_is_no_choice(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name.startswith("OPT"))
    make_hf(case, tmp_path)
    with pytest.raises(HuggingFaceError, match=r"max_positions=2048 \(the folder has"):
        completed(tmp_path, max_positions=2048)


@pytest.mark.parametrize("value", [["", "x"], ["x", " "], "", []])
def test_empty_folders_are_refused(value: Any) -> None:
    with pytest.raises(ValidationError, match=r"vision_from_hf=.* is empty, or holds an empty entry"):
        InitConfig(vision_from_hf=value)


def test_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    init = InitConfig(vision_from_hf=["~/a", "b/~c"], language_from_hf="~/d")
    assert init.folders == [str(tmp_path / "a"), "b/~c", str(tmp_path / "d")]
