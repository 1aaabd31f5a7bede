"""Load a model to use it: from a run, from one of its checkpoints, or from a Hugging Face folder; into any tensor-parallel size."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from megavlm.checkpoint import store
from megavlm.checkpoint.folders import STATE, read_state
from megavlm.checkpoint.hf import config_from_hf, image_config_from_hf, load_hf, start_from
from megavlm.checkpoint.hf.generation import GENERATION, GenerationDefaults, generation_defaults
from megavlm.checkpoint.hf.reading import CONFIG
from megavlm.checkpoint.hf.texts import KEPT, image_token_of, instructions_of, template_of
from megavlm.config.data import CHAT_TEMPLATES
from megavlm.config.load import load_recipe
from megavlm.config.schema import DataConfig, ModelConfig, ParallelConfig, PrecisionConfig, Recipe, RunConfig
from megavlm.config.tensor_split import check_tensor_split
from megavlm.data.chat import Chat
from megavlm.data.tokenizer import Tokenizer, load_tokenizer
from megavlm.inference.loaded import LoadedModel
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.context import ParallelContext, choose_device, enter_grid, entered_group, leave_grid, start_process_group

log = logging.getLogger(__name__)
MODULES = ("vision", "projector", "language")
_group_of_last_load: dist.ProcessGroup | None = None
"""Tells the grid that a load entered from one that the caller entered and uses."""


class LoadError(ValueError):
    """A folder that no model can be loaded from."""


def load_for_inference(
    path: str | Path,
    *,
    parallel: ParallelConfig | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["fp32", "bf16"] | None = None,
    chat_template: str | None = None,
    ctx: ParallelContext | None = None,
) -> LoadedModel:
    """Load a model from a run's folder (newest checkpoint), a checkpoint in it, or a Hugging Face folder, as it is or imported.

    All ranks call it together; a lone process needs nothing started. It gives (model, tokenizer, chat, recipe).

    Args:
        parallel: layout to load into, one pipeline stage; None: one rank (all data-parallel where there are more).
        dtype: None: as the run trained; bf16 on a GPU and fp32 on a CPU for a Hugging Face folder.
        chat_template: instead of a Hugging Face folder's own: a name, or a *.jinja file.
        ctx: grid that was entered already, in the layout `parallel`; None: it is entered here, and one that an earlier load entered is
            left. Models of several tensor-parallel ranks that are used by turns share one `ctx`.

    Raises:
        LoadError: the folder is none of the three, a run without a checkpoint, an unknown chat template, a layout with
            several pipeline stages, or no `ctx` in a process that has entered a grid itself.
        ValueError: `parallel.tensor` does not divide the model.
    """
    folder = Path(path)
    layout = parallel or ParallelConfig()
    if layout.pipeline > 1 or layout.context > 1 or layout.sequence:
        raise LoadError(
            f"inference runs on one pipeline stage: use pipeline=1, context=1, sequence=false instead of pipeline={layout.pipeline}, "
            f"context={layout.context}, sequence={str(layout.sequence).lower()} (tensor may be any size)"
        )
    imported = folder if (folder / KEPT / "config.json").is_file() and (folder / STATE).is_file() else None
    is_hf = (folder / "config.json").is_file() or imported is not None
    checkpoint = imported if is_hf else find_checkpoint(folder)
    brought = folder / KEPT if imported is not None else folder
    recipe = _hf_recipe(brought, chat_template, imported) if is_hf else load_recipe(_run(folder) / "recipe.yaml")
    run = recipe.run.model_copy(update={"device": device if device != "auto" or is_hf else recipe.run.device})
    check_tensor_split(recipe.model, layout)
    if ctx is None:
        ctx = _enter(layout, run)
    if dtype is None and is_hf:
        dtype = "bf16" if ctx.device.type == "cuda" else "fp32"
    precision = recipe.precision.without_fp8() if dtype is None else PrecisionConfig(dtype=dtype)
    recipe = recipe.model_copy(update={"precision": precision})
    tokenizer = load_tokenizer(recipe.data.tokenizer, recipe.data.image_token)
    # Before the weights: what it refuses should not take minutes to be told.
    texts = brought if is_hf else _texts_it_began_with(_run(folder), recipe)
    defaults = GenerationDefaults() if texts is None else generation_defaults(texts)
    chat = Chat(recipe.data.chat_template, tokenizer, recipe.data.image.marks, defaults.stop_ids)
    if texts is not None and defaults.not_taken and ctx.rank == 0:
        log.warning(
            "%s asks for %s, which is not taken: answers are greedy unless you say otherwise",
            texts / GENERATION,
            ", ".join(defaults.not_taken),
        )
    model = VisionLanguageModel(recipe.model, recipe.precision, layout, ctx)
    if checkpoint is None:
        load_hf([model], folder, recipe.model, ctx)
    else:
        _load_modules(model, checkpoint, recipe, ctx)
    model.eval()
    return LoadedModel(model, tokenizer, chat, recipe, defaults.repetition_penalty)


def _enter(layout: ParallelConfig, run: RunConfig) -> ParallelContext:
    """A grid for this load; that of an earlier load in this process, failed ones included, makes way."""
    global _group_of_last_load
    group = entered_group()
    if group is not None:
        if group is not _group_of_last_load:
            raise LoadError("this process is in a parallel grid already: give its ParallelContext as ctx, or call leave_grid() first")
        leave_grid()
    device = choose_device(run)
    start_process_group(device, run.distributed_timeout_s)
    ctx = enter_grid(layout, device, run.seed)
    _group_of_last_load = ctx.tensor_group
    return ctx


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint that `folder` is, or the newest one of the run that it is. Raises LoadError."""
    if not folder.is_dir():
        raise LoadError(f"{folder}: there is no such folder")
    if (folder / "recipe.yaml").is_file():
        newest = store.newest(folder)
        if newest is None:
            raise LoadError(f"{folder} is a run without a complete checkpoint: train it first, or give another folder")
        return newest
    if (folder.parent.parent / "recipe.yaml").is_file() and folder.parent.name == "checkpoints":
        return folder
    raise LoadError(
        f"{folder} is neither a run (recipe.yaml), nor a checkpoint of one (RUN/checkpoints/...), nor a Hugging Face folder (config.json)"
    )


def _run(folder: Path) -> Path:
    """The run that `folder` is, or is a checkpoint of."""
    return folder if (folder / "recipe.yaml").is_file() else folder.parent.parent


def of_training(model: VisionLanguageModel, recipe: Recipe, tokenizer: Tokenizer) -> LoadedModel:
    """A model that is being trained, to be asked what `load_for_inference` would ask of its checkpoint: one pipeline stage, whole on its
    tensor ranks."""
    texts = _texts_it_began_with(Path(recipe.run.dir), recipe)
    defaults = GenerationDefaults() if texts is None else generation_defaults(texts)
    chat = Chat(recipe.data.chat_template, tokenizer, recipe.data.image.marks, defaults.stop_ids)
    return LoadedModel(model, tokenizer, chat, recipe, defaults.repetition_penalty)


def _texts_it_began_with(run_dir: Path, recipe: Recipe) -> Path | None:
    """What a run keeps of the folder whose model and tokenizer it took: its export has that folder's generation_config.json too."""
    kept = run_dir / KEPT
    keeps_tokenizer = recipe.init.from_hf is not None and recipe.data.tokenizer == recipe.init.from_hf
    return kept if keeps_tokenizer and (kept / CONFIG).is_file() else None


def _load_modules(model: VisionLanguageModel, checkpoint: Path, recipe: Recipe, ctx: ParallelContext) -> None:
    """Each module from the newest checkpoint that holds it, as the next stage of training would take it."""
    folders = {name: folder for name, folder in dict(store.module_folders(checkpoint)).items() if name in MODULES}
    unheld = [name for name in MODULES if name not in folders and getattr(model, name, None) is not None]
    if unheld:
        start = " and ".join(recipe.init.folders) or "random weights"
        log.warning("no stage of this run has trained %s yet: taken as the run started (%s)", ", ".join(unheld), start)
        start_from([model], recipe.init, recipe.model, recipe.run.seed, ctx)
    for folder in sorted(set(folders.values())):
        store.load(folder, [model], None, ctx, modules={name for name, held_by in folders.items() if held_by == folder})


def _hf_recipe(folder: Path, chat_template: str | None, imported: Path | None) -> Recipe:
    """What a recipe says of a model, for a folder that has none. A recipe needs stages to train; this one has none to give."""
    # Of an import only the checkpoint knows whether the weights themselves were tied.
    model = config_from_hf(folder) if imported is None else ModelConfig.model_validate(read_state(imported)["model"])
    values = {"tokenizer": str(folder), "chat_template": _template_name(folder, chat_template), "image": image_config_from_hf(folder)}
    values["instruction_tokenizer"] = instructions_of(folder)
    token = image_token_of(folder)
    data = DataConfig.model_validate(values | ({"image_token": token} if token is not None else {}))
    return Recipe.model_construct(run=RunConfig(name=folder.name, dir=str(folder)), model=model, data=data, stages=[])


def _template_name(folder: Path, wanted: str | None) -> str:
    """What data.chat_template says of the folder: a name of ours that renders as its own template does, else its own."""
    if wanted is not None:
        if wanted not in CHAT_TEMPLATES and wanted != "tokenizer" and not wanted.endswith(".jinja"):
            raise LoadError(f'chat template {wanted!r} is none of {", ".join(CHAT_TEMPLATES)}, nor "tokenizer", nor a *.jinja file')
        return wanted
    return template_of(folder) or "tokenizer"
