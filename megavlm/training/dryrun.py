"""What a run would do, without doing it: rank grid, parameters and memory of each rank, plan of every stage's first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megavlm.checkpoint.hf.load import check_start
from megavlm.config.schema import ParallelConfig, Recipe, StageConfig
from megavlm.data.index import SampleIndex, build_index
from megavlm.data.plan import StepPlanner, check_tasks, step_table
from megavlm.data.tokenizer import load_tokenizer
from megavlm.data.types import StepPlan
from megavlm.planner.attention import attention_table
from megavlm.planner.checkpoints import checkpoint_table
from megavlm.planner.context import segments_of, split_table
from megavlm.planner.faults import faults_table
from megavlm.planner.flops import FlopsModel
from megavlm.planner.memory import estimate_memory, memory_table
from megavlm.planner.parameters import params
from megavlm.planner.pictures import PictureDeal, PictureDealer, copies_of_pictures, encoder_layout_table
from megavlm.planner.precision import precision_table
from megavlm.planner.recompute import recomputed
from megavlm.planner.stages import microbatch_cost, stage_table
from megavlm.topology.grid import RankGrid
from megavlm.topology.pipeline import PipelineSplit
from megavlm.topology.table import human_count, text_table
from megavlm.training.layout import check_layouts, check_run, settled_layout, shape_of, stage_layout


def dry_run(recipe: Recipe, world_size: int, echo: Callable[[str], object], *, runs_here: bool = True) -> None:
    """Check the recipe against the grid and the data, and print what it comes to; with `runs_here` also against this machine.

    Raises:
        ValueError: whatever the run itself would refuse: a grid that does not divide, layers that do not split, missing data,
            a damaged init folder, samples over the budget.
    """
    if runs_here:
        check_run(recipe, world_size)
    else:
        check_layouts(recipe, world_size)
    check_start(recipe.init)
    if runs_here:
        echo(attention_table(recipe) + "\n")
        echo(precision_table(recipe) + "\n")
    echo(checkpoint_table(recipe, world_size) + "\n")
    echo(faults_table(recipe, world_size) + "\n")
    tokenizer = load_tokenizer(recipe.data.tokenizer, recipe.data.image_token)
    for number, stage in enumerate(recipe.stages):
        layout = stage_layout(recipe.parallel, stage, recipe.model)
        grid = RankGrid.from_config(layout, world_size)
        if number == 0 or layout != stage_layout(recipe.parallel, recipe.stages[number - 1], recipe.model):
            echo(grid.table() + "\n")
        echo(f"stage {stage.name}: {stage.objective}, {stage.steps} steps of {stage.packs_per_step} packs")
        echo(_parameter_table(recipe, stage) + "\n")
        indexes: dict[str, SampleIndex] = {
            name: build_index(recipe.data.sources[name], recipe.data, recipe.model, stage.objective, tokenizer) for name in stage.sources
        }
        check_tasks(stage, (task for index in indexes.values() for task in index.task_names))
        layout = settled_layout(recipe, number, layout, world_size, indexes)
        planner = StepPlanner(
            indexes,
            stage,
            recipe.data,
            recipe.model,
            seed=recipe.run.seed + number,
            dp_size=grid.data,
            num_microbatches=grid.num_microbatches(stage),
        )
        plan = planner.next()
        microbatches = [segments_of(packs, recipe.data.seq_len_tokens) for rank in plan.assignment for packs in rank]
        segments = max(map(len, microbatches)) if layout.context > 1 else 0
        device = "cpu" if recipe.run.device == "cpu" else "cuda"
        echo(memory_table(estimate_memory(recipe.model, stage, recipe.data, grid, layout, recipe.precision, segments, device)) + "\n")
        if planner.early_end is not None:
            echo(f"warning: {planner.early_end}\n")
        if grid.pipeline > 1:
            echo(_stages_table(recipe, stage, layout, plan) + "\n")
        echo(step_table(plan) + "\n")
        if layout.context > 1:
            echo(split_table(recipe.model, stage, microbatches, layout) + "\n")
        if stage.objective == "multimodal" and layout.tensor * layout.context > 1:
            echo(encoder_layout_table(recipe.model, layout, _deals(recipe, stage, layout, plan, indexes)) + "\n")


def _deals(
    recipe: Recipe, stage: StageConfig, layout: ParallelConfig, plan: StepPlan, indexes: Mapping[str, SampleIndex]
) -> list[PictureDeal | None]:
    """Of every microbatch with pictures: which rank encodes which."""
    dealer = PictureDealer.of(recipe.model, layout, 4 if recipe.precision.dtype == "fp32" else 2, stage)
    if dealer is None:
        return []
    native, found = recipe.data.image.policy == "native", []
    for microbatch in (microbatch for rank in plan.assignment for microbatch in rank):
        grids = [grid for pack in microbatch for sample in pack.samples for grid in indexes[sample.source].grids(sample.row)]
        if grids:
            tiles, sizes = [grid.work.tiles for grid in grids], [(grid.rows, grid.cols) for grid in grids]
            found.append(dealer.deal(sum(tiles), sizes if native else None, tiles))
    return found


def _stages_table(recipe: Recipe, stage: StageConfig, layout: ParallelConfig, plan: StepPlan) -> str:
    flops, again = FlopsModel(recipe.model, stage), recomputed(layout, recipe.model)
    copies = copies_of_pictures(recipe.model, layout)
    ranks = [[microbatch_cost(flops, map(shape_of, packs), again=again, copies=copies) for packs in rank] for rank in plan.assignment]
    return stage_table(PipelineSplit.of(recipe.model.language.num_layers, layout), ranks)


def _parameter_table(recipe: Recipe, stage: StageConfig) -> str:
    rows = [(module, human_count(count.total), human_count(count.trainable)) for module, count in params(recipe.model, stage).items()]
    return text_table(("module", "parameters", "training"), rows, "parameters of the whole model")
