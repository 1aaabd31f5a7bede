"""What text sees in cross-attention layers, as the plan counts it: cost that ranks are balanced by."""

from __future__ import annotations

from pathlib import Path

from megavlm.data.index import build_index
from megavlm.data.plan import StepPlanner
from megavlm.data.tokenizer import load_tokenizer
from megavlm.planner.flops import FlopsModel
from megavlm.testing.recipes import tiny_recipe, tiny_stage


def test_packs_carry_looks_and_cost_more_for_them(data_dir: Path, tmp_path: Path) -> None:
    stage = tiny_stage() | {"mixture": {"pages": 0.3, "multi": 0.3, "text": 0.4}}
    reads = {"language": {"cross_attention": {"layers": [1]}, "tie_embeddings": False}}
    recipe = tiny_recipe(tmp_path, data_dir, [stage], model=reads)
    assert recipe.data.tokenizer is not None
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    model, config = recipe.model, recipe.stages[0]
    indexes = {name: build_index(recipe.data.sources[name], recipe.data, model, config.objective, tokenizer) for name in config.sources}
    planner = StepPlanner(indexes, config, recipe.data, model, seed=1, dp_size=2, num_microbatches=2)
    packs = [pack for _ in range(3) for rank in planner.next().assignment for microbatch in rank for pack in microbatch]
    flops = FlopsModel(model, config)
    seen = set()
    for pack in packs:
        expected = 0
        for ref, length in zip(pack.samples, pack.lengths_tokens, strict=True):
            grids = indexes[ref.source].grids(ref.row)
            seen.add(len(grids))
            expected += length * sum(g.work.tiles for g in grids) * model.visual_tokens_per_tile // max(len(grids), 1)
        assert pack.vision.looks == expected
        blind = flops.total(pack.lengths_tokens, pack.vision._replace(looks=0), pack.num_targets)
        assert pack.flops >= blind and (pack.flops > blind) == (expected > 0)
    assert {0, 1} <= seen and max(seen) > 1, "samples without, with one and with several pictures"
