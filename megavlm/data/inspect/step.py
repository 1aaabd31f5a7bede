"""One step of a stage as plain values: planned for any data-parallel size, its first packs read. No process group, no GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from megavlm.config.schema import DataConfig, StageConfig
from megavlm.data.index import SampleIndex
from megavlm.data.inspect.detail import PackReader
from megavlm.data.inspect.opened import OpenStage
from megavlm.data.inspect.views import Cost, PackView, SampleView, Share, StepView
from megavlm.data.shares import weight_at
from megavlm.data.types import PackPlan, SampleRef, StepPlan
from megavlm.planner.flops import FlopsModel


def plan_step(opened: OpenStage, step: int, dp_size: int, at_step: Callable[[int], object] | None = None) -> StepPlan:
    """The plan of step `step` (counted from 0) of the stage; planning every step before it reads no sample.

    `at_step` is called with the number of each step when it is planned.
    """
    planner = opened.planner(dp_size)
    while True:
        plan = planner.next()
        if at_step is not None:
            at_step(plan.step)
        if plan.step == step:
            return plan


def look_at_step(opened: OpenStage, plan: StepPlan, name: str, num_detailed: int) -> StepView:
    """Everything that the page of a step shows.

    Args:
        name: what to call the recipe.
        num_detailed: so many packs, in the order of ranks and microbatches, are read and shown sample by sample.
    """
    flops = FlopsModel(opened.recipe.model, opened.stage)
    reader = PackReader(opened) if num_detailed else None
    packs: list[PackView] = []
    for rank, microbatches in enumerate(plan.assignment):
        for number, group in enumerate(microbatches):
            for place, pack in enumerate(group):
                view = _pack(opened, flops, pack, rank, number, place)
                packs.append(reader.read(pack, view) if reader is not None and len(packs) < num_detailed else view)
    return StepView(
        recipe=name,
        stage=opened.stage.name,
        objective=opened.stage.objective,
        step=plan.step,
        num_steps=opened.stage.steps,
        dp_size=len(plan.assignment),
        num_microbatches=len(plan.assignment[0]),
        packs=tuple(packs),
        shares=_shares(opened, plan),
        statistics=plan.statistics,
        settings=_settings(opened),
    )


def target_shares(stage: StageConfig, rows: Mapping[str, int], step: int) -> dict[str, float]:
    """Share of samples that the recipe asks of each source at `step`. `rows`: samples that each source has.

    A source that has reached its `max_epochs` keeps its share here: the difference to what was drawn is what it no longer gives.
    """
    weights = {name: float(weight_at(entry, rows[name], step)) for name, entry in stage.mixture_entries.items()}
    whole = sum(weights.values())
    return {name: weight / whole if whole else 0.0 for name, weight in weights.items()}


def cost_of(flops: FlopsModel, pack: PackPlan) -> Cost:
    """FLOPs of a pack, encoder and projector against language model."""
    parts = flops.pack(pack.lengths_tokens, pack.vision, pack.num_targets).by_part
    language = sum(work.total for part, work in parts.items() if part.startswith("language."))
    return Cost(vision=float(sum(work.total for work in parts.values()) - language), language=float(language))


def _pack(opened: OpenStage, flops: FlopsModel, pack: PackPlan, rank: int, microbatch: int, place: int) -> PackView:
    samples = [_sample(opened.indexes[ref.source], ref, length) for ref, length in zip(pack.samples, pack.lengths_tokens, strict=True)]
    return PackView(
        rank=rank,
        microbatch=microbatch,
        place=place,
        samples=tuple(samples),
        capacity=opened.capacity,
        used=sum(pack.lengths_tokens),
        patches=pack.vision.patches,
        targets=pack.num_targets,
        cost=cost_of(flops, pack),
    )


def _sample(index: SampleIndex, ref: SampleRef, length: int) -> SampleView:
    return SampleView(
        source=ref.source,
        row=ref.row,
        key=index.key(ref.row),
        task=index.task(ref.row),
        length=length,
        targets=int(index.num_targets[ref.row]),
        tiles=int(index.num_tiles[ref.row]),
        patches=int(index.num_patches[ref.row]),
    )


def _shares(opened: OpenStage, plan: StepPlan) -> tuple[Share, ...]:
    counts = Counter(ref.source for rank in plan.assignment for group in rank for pack in group for ref in pack.samples)
    rows = {name: len(index) for name, index in opened.indexes.items()}
    targets = target_shares(opened.stage, rows, plan.step)
    return tuple(
        Share(name, targets[name], counts[name], round(plan.statistics.get(f"epochs/{name}", 0.0) * rows[name]), rows[name])
        for name in opened.stage.sources
    )


def _settings(opened: OpenStage) -> dict[str, str]:
    """Fields of the recipe that explain what is seen."""
    data: DataConfig = opened.recipe.data
    image, stage = data.image, opened.stage
    if stage.objective == "vision_classification":
        return {"images_per_pack": str(stage.images_per_pack), "num_classes": str(stage.num_classes)}
    found = {"seq_len_tokens": str(data.seq_len_tokens), "chat_template": data.chat_template, "loss averaging": stage.loss.averaging}
    if stage.objective == "multimodal":
        policy = {"fixed": f"fixed ({image.fit})", "tiles": f"tiles ({image.min_tiles} to {image.max_tiles})"}
        found["image.policy"] = policy.get(image.policy, image.policy)
        for name in ("max_tokens_per_image", "max_tokens_per_sample"):
            if (value := getattr(image, name)) is not None:
                found[f"image.{name}"] = str(value)
    if data.max_patches_per_pack is not None:
        found["max_patches_per_pack"] = f"{data.max_patches_per_pack} ({data.patch_budget})"
    return found
