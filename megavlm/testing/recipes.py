"""Recipes for tests: a tiny model on real demonstration data, through the whole route."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megavlm.config.schema import Recipe, StageConfig
from megavlm.data.demo import make_demo
from megavlm.tracking.metrics import read_metrics

ENCODER_FROZEN = {"vision": {"train": "frozen"}, "projector": {"train": "full"}, "language": {"train": "full"}}
PROJECTOR_ONLY = {"vision": {"train": "frozen"}, "projector": {"train": "full"}, "language": {"train": "frozen"}}
ALL_TRAIN = {"vision": {"train": "full"}, "projector": {"train": "full"}, "language": {"train": "full"}}
TOP_LAYERS = {
    "vision": {"train": "last_layers", "last_layers": 1, "lr_scale": 0.1},
    "projector": {"train": "full"},
    "language": {"train": "last_layers", "last_layers": 2, "weight_decay": 0.1},
}
TRAINING = {"all": ALL_TRAIN, "encoder_frozen": ENCODER_FROZEN, "projector_only": PROJECTOR_ONLY, "top_layers": TOP_LAYERS}
"""Ways of freezing that every layout is tried with."""
# Adam's default epsilon would amplify rounding on gradients that are mathematically zero.
PARITY_OPTIMIZER = {"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.01}


def make_tiny_data(folder: str | Path) -> Path:
    """A few hundred pages, conversations and texts; made once per test session."""
    make_demo(folder, seed=1, num_train=300, num_held_out=40, page_px=48, num_workers=1)
    return Path(folder)


def tiny_stage(name: str = "all", steps: int = 5, **changes: Any) -> dict[str, Any]:
    """A multimodal stage in which some packs, and whole microbatches, have no picture."""
    return {
        "name": name,
        "steps": steps,
        "packs_per_step": 4,
        "mixture": {"pages": 0.2, "multi": 0.1, "text": 0.7},
        "optimizer": PARITY_OPTIMIZER,
        "schedule": {"kind": "cosine", "warmup_steps": 1, "min_lr_fraction": 0.5},
        **(ALL_TRAIN | changes),
    }


def encoder_stage(name: str = "encoder", steps: int = 2, **changes: Any) -> dict[str, Any]:
    """A stage that pretrains the encoder alone, on what its patches show."""
    return {
        "name": name,
        "objective": "vision_classification",
        "steps": steps,
        "packs_per_step": 4,
        "images_per_pack": 4,
        "num_classes": 11,
        "mixture": {"patches": 1.0},
        "vision": {"train": "full"},
        "optimizer": PARITY_OPTIMIZER,
        **changes,
    }


def tiny_recipe(run_dir: str | Path, data_dir: str | Path, stages: list[dict[str, Any]] | None = None, **changes: dict[str, Any]) -> Recipe:
    """A recipe of two encoder and four language layers. `changes` update whole blocks: parallel={"tensor": 2}."""
    data = Path(data_dir)
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": str(run_dir), "device": "cpu", "seed": 1},
        "model": {
            # A small initialisation hides position and masking mistakes.
            "init_std": 0.2,
            "vision": {
                "image_size_px": 48,
                "patch_size_px": 8,
                "num_layers": 3,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "ffn_hidden_size": 64,
                "feature_layer": -2,
            },
            "language": {
                "vocab_size": 512,
                "num_layers": 4,
                "hidden_size": 48,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "ffn_hidden_size": 96,
                "tie_embeddings": True,
            },
        },
        "parallel": {},
        "precision": {"dtype": "fp32"},
        "data": {
            "tokenizer": str(data / "tokenizer.model"),
            "seq_len_tokens": 256,
            "pack_window_samples": 32,
            "sources": {
                **{name: {"path": str(data / name)} for name in ("pages", "multi", "text", "patches")},
                "held_out": {"path": str(data / "pages"), "split": "heldout"},
            },
        },
        "evaluation": {},
        "checkpoint": {},
        "faults": {},
        "tracking": {"mlflow": False, "peak_tflops_per_rank": 0.1, "num_sample_pictures": 0},
    }
    for block, update in changes.items():
        values[block] = _merged(values[block], update)
    return Recipe.model_validate({**values, "stages": [StageConfig.model_validate(s) for s in stages or [tiny_stage()]]})


def _merged(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in update.items():
        merged[key] = _merged(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged


def assert_same_records(
    records: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]], loss: float = 1e-5, grad_norm: float = 1e-4
) -> None:
    """The same steps, with losses and gradient norms that are equal up to these relative differences: what layouts promise."""
    assert [record["step"] for record in records] == [record["step"] for record in reference]
    for record, expected in zip(records, reference, strict=True):
        for name, allowed in (("loss", loss), ("grad_norm", grad_norm)):
            got, wanted = record[name], expected[name]
            assert abs(got - wanted) <= allowed * abs(wanted), f"step {record['step']}: {name} {got}, not {wanted} (allowed: {allowed:g})"


def train_and_read(recipe: Recipe) -> list[dict[str, Any]]:
    """Train on this rank; the run's metrics, a record a step. No curves are drawn: they would take as long as the steps."""
    from megavlm.tracking.tracker import Tracker
    from megavlm.training.run import train

    with patch.object(Tracker, "_draw_curves"):
        code = train(recipe)
    assert code == 0, f"training ended with exit code {code}"
    return read_metrics(recipe.run.dir)
