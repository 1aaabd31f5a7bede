"""Which attention backends could serve a model's parts, on any machine: for the dry run, and to refuse a forced one before the start."""

from __future__ import annotations

from megavlm.config.schema import Recipe
from megavlm.topology.table import text_table
from megavlm_kernels.packed_attention.selection import BACKENDS, BackendError, Call, Machine, choose, unmet_need


def attention_calls(recipe: Recipe) -> dict[str, Call]:
    """Part of the model -> what its attention needs."""
    model, dtype = recipe.model, recipe.precision.dtype
    language, calls = model.language, {}
    if any(stage.objective != "vision_classification" for stage in recipe.stages):
        softcap, masked = language.attention_softcap is not None, language.bidirectional != "none"
        if len(set(language.sliding_layers)) < language.num_layers:
            calls["language"] = Call(dtype, language.head_width, False, softcap, masked)
        if language.sliding_layers:
            calls["language, sliding layers"] = Call(dtype, language.head_width, True, softcap, masked)
        if language.cross_attention is not None:
            calls["language, cross-attention"] = Call(dtype, language.head_width)
    if model.text_only:
        return calls
    for number, encoder in enumerate(model.encoders):
        name = "vision" if number == 0 else f"vision_beside[{number - 1}]"
        calls[name] = Call(dtype, encoder.hidden_size // encoder.num_attention_heads)
    resampler, qformer = model.projector.resampler, model.projector.qformer
    if resampler is not None:
        calls["projector.resampler"] = Call(dtype, resampler.head_dim)
    if qformer is not None:
        calls["projector.qformer"] = Call(dtype, qformer.hidden_size // qformer.num_attention_heads)
    return calls


def check_attention(recipe: Recipe) -> None:
    """Raises BackendError where precision.attention names a backend that no machine can serve the model by, or that a CPU lacks."""
    forced = recipe.precision.attention
    if forced == "auto":
        return
    for part, call in attention_calls(recipe).items():
        reason = unmet_need(forced, call)
        if reason is not None:
            raise BackendError(f"precision.attention={forced} cannot serve model.{part}: {reason}. Set it to auto or sdpa")
        if recipe.run.device == "cpu":
            choose(call, Machine("cpu"), forced)


def attention_table(recipe: Recipe) -> str:
    """For --dry-run: what each part needs, and what can serve it where it is there."""
    forced = recipe.precision.attention
    rows = []
    for part, call in attention_calls(recipe).items():
        needs = [call.dtype, f"heads of {call.head_width}"]
        needs += [name for name, wanted in (("window", call.window), ("soft cap", call.softcap), ("masks", call.masked)) if wanted]
        can = [backend for backend in BACKENDS if unmet_need(backend, call) is None] if forced == "auto" else [forced]
        rows.append((part, ", ".join(needs), ", ".join(can)))
    return text_table(
        ("part", "needs", "backends"), rows, f"attention (precision.attention={forced}; ranks take the fastest that is there)"
    )
