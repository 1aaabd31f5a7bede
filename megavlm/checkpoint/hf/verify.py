"""Does a Hugging Face folder hold the model of a checkpoint? Tensor by tensor, and by the logits of both implementations."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

import megavlm
from megavlm.checkpoint import folders, store
from megavlm.checkpoint.errors import HuggingFaceError, some
from megavlm.checkpoint.hf.config import config_from_hf, network
from megavlm.checkpoint.hf.export import groups_of
from megavlm.checkpoint.hf.load import links_of, open_weights
from megavlm.checkpoint.hf.registry import family
from megavlm.checkpoint.hf.seeded import seeded_prompts
from megavlm.checkpoint.hf.sources import CheckpointSource, find_checkpoint
from megavlm.checkpoint.hf.tensor_files import raw_bytes
from megavlm.checkpoint.progress import progress_bar
from megavlm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megavlm.data.prompt import Prompt, prompt_batch
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.context import ParallelContext

TOLERANCE = 1e-4
"""Largest difference of fp32 logits, relative to the largest logit where that exceeds 1."""
BLIND = "The logits are the same with other pictures (gates or weights are zero), so they prove nothing of the encoder"
_PACKAGES = ("torch", "transformers", "safetensors", "megatron-core")


@dataclass(frozen=True)
class TensorProof:
    """One Hugging Face tensor: SHA-256 of its bytes in the folder, and of what the checkpoint makes of it."""

    name: str
    dtype: str
    shape: list[int]
    sha256_folder: str | None
    """None: the folder lacks it."""
    sha256_checkpoint: str | None
    """None: the checkpoint lacks it, or has it in another format or shape."""

    @property
    def equal(self) -> bool:
        return self.sha256_folder is not None and self.sha256_folder == self.sha256_checkpoint


@dataclass(frozen=True)
class LogitProof:
    """One seeded sample, alone through Hugging Face's class and in a pack with the others through ours."""

    sample: str
    tokens: int
    max_abs_difference: float
    max_abs_logit: float
    picture_effect: float | None = None
    """Largest change of our logits when every pixel is inverted; None: a sample without pictures."""

    @property
    def equal(self) -> bool:
        return self.max_abs_difference <= TOLERANCE * max(1.0, self.max_abs_logit)


@dataclass(frozen=True)
class Verification:
    """Outcome of `verify`."""

    checkpoint: str
    folder: str
    family: str
    hf_class: str
    seed: int
    tolerance: float
    versions: dict[str, str]
    tensors: list[TensorProof]
    logits: list[LogitProof]
    """Empty when they were not asked for."""

    @property
    def unequal(self) -> list[str]:
        """Tensors that differ, or that only one side has."""
        return [tensor.name for tensor in self.tensors if not tensor.equal]

    @property
    def max_abs_logit_difference(self) -> float:
        return max((proof.max_abs_difference for proof in self.logits), default=0.0)

    @property
    def pictures_matter(self) -> bool | None:
        """Whether other pictures give other logits at all: behind gates of zero they say nothing of the encoder. None: no pictures."""
        effects = [proof.picture_effect for proof in self.logits if proof.picture_effect is not None]
        return any(effect > 0 for effect in effects) if effects else None

    @property
    def ok(self) -> bool:
        return not self.unequal and all(proof.equal for proof in self.logits)

    def to_json(self) -> dict[str, Any]:
        summary = {"ok": self.ok, "unequal": self.unequal, "max_abs_logit_difference": self.max_abs_logit_difference}
        return summary | {"pictures_matter": self.pictures_matter} | asdict(self)

    def to_markdown(self) -> str:
        """The report for a reader: a page, with the tensors that differ by name."""
        lines = [
            f"# {self.folder}: {'equal to' if self.ok else 'DIFFERENT FROM'} {self.checkpoint}",
            "",
            f"Family {self.family}, {self.hf_class}. " + ", ".join(f"{name} {version}" for name, version in self.versions.items()) + ".",
            "",
            f"{len(self.tensors) - len(self.unequal)} of {len(self.tensors)} tensors are equal bit for bit (SHA-256: in the JSON file).",
        ]
        if self.unequal:
            lines.append(f"They differ in: {some(self.unequal, limit=40)}.")
        if self.logits:
            lines += [
                "",
                f"Largest difference of fp32 logits, seed {self.seed} (allowed: {self.tolerance:g}, times the largest logit above 1):",
                "",
                "| sample | tokens | difference | largest logit | change with other pictures |",
                "|---|---|---|---|---|",
                *(
                    f"| {p.sample} | {p.tokens} | {p.max_abs_difference:.2e} | {p.max_abs_logit:.3g} | "
                    f"{'-' if p.picture_effect is None else format(p.picture_effect, '.3g')} |"
                    for p in self.logits
                ),
            ]
        if self.pictures_matter is not None:
            lines += ["", f"Pictures matter: {'yes' if self.pictures_matter else f'no. {BLIND}'}."]
        return "\n".join(lines) + "\n"

    def write(self, file: Path) -> tuple[Path, Path]:
        """Write `file` (JSON) and the Markdown page beside it."""
        page = file.with_suffix(".md")
        file.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
        page.write_text(self.to_markdown(), encoding="utf-8")
        return file, page


def verify(
    run_or_checkpoint: str | Path, folder: str | Path, ctx: ParallelContext | None, *, seed: int = 0, logits: bool = True
) -> Verification:
    """Compare every tensor bit by bit, and fp32 logits on seeded samples: text, one picture, one of an odd size, several.

    `ctx` is the grid of one rank that logits are computed on; without `logits` none is needed. A difference is not an error: see
    `Verification.ok`.

    Raises:
        HuggingFaceError: the folder cannot be read, or holds a model of another shape.
        CheckpointError: the checkpoint is incomplete or damaged.
    """
    checkpoint, folder = find_checkpoint(run_or_checkpoint), Path(folder)
    model = config_from_hf(folder)
    _check_same_model(checkpoint, model)
    tensors = compare_tensors(checkpoint, folder, model)
    proofs: list[LogitProof] = []
    if logits:
        assert ctx is not None, "logits are computed on a rank"
        proofs = compare_logits(checkpoint, folder, model, ctx, seed)
    versions = {"megavlm": megavlm.__version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    kind = family(model.family)
    return Verification(str(checkpoint), str(folder), kind.name, kind.hf_class, seed, TOLERANCE, versions, tensors, proofs)


def compare_tensors(checkpoint: Path, folder: str | Path, model: ModelConfig) -> list[TensorProof]:
    """Every tensor of either side, one in memory at a time."""
    found, seen = [], set()
    source = CheckpointSource(checkpoint)
    try:
        with open_weights(folder, model) as weights:
            groups = groups_of(model, source)
            with progress_bar("verify", sum(entry.nbytes for group in groups for entry in group.entries)) as bar:
                for group in groups:
                    for entry, ours in zip(group.entries, group.make(), strict=True):
                        seen.add(entry.name)
                        theirs = weights.tensor(entry.name) if entry.name in weights.names else None
                        found.append(_proof(entry.name, theirs, ours))
                        bar.update(entry.nbytes)
            aliases = {alias for link in links_of(model) for alias in link.aliases}
            found += [_proof(name, weights.tensor(name), None) for name in sorted(weights.names - seen - aliases)]
        source.check()
    finally:
        source.close()
    return found


def _proof(name: str, theirs: torch.Tensor | None, ours: torch.Tensor | None) -> TensorProof:
    """One of the two is there. The same bytes in another format or shape are another tensor."""
    like = theirs if theirs is not None else ours
    assert like is not None
    if theirs is not None and ours is not None and (theirs.dtype, theirs.shape) != (ours.dtype, ours.shape):
        ours = None
    sums = [None if t is None else hashlib.sha256(raw_bytes(t.contiguous())).hexdigest() for t in (theirs, ours)]
    return TensorProof(name, str(like.dtype).removeprefix("torch."), list(like.shape), sums[0], sums[1])


@torch.no_grad()
def compare_logits(checkpoint: Path, folder: Path, model: ModelConfig, ctx: ParallelContext, seed: int) -> list[LogitProof]:
    """Samples of a seed: Hugging Face's one by one, ours in one pack; one of the two models in memory at a time."""
    kind = family(model.family)
    hf = kind.hf_model(folder)
    image_token = getattr(hf.config, kind.image_token_field, None)
    prompts = seeded_prompts(model, kind.image_of_proofs(folder, model), image_token, seed)
    theirs = [hf(**kind.hf_inputs(model, prompt)).logits[0].float() for prompt in prompts]
    del hf
    ours = VisionLanguageModel(model, PrecisionConfig(dtype="fp32"), ParallelConfig(), ctx)
    for module, where in store.module_folders(checkpoint).items():
        if getattr(ours, module, None) is not None:
            store.load(where, [ours], None, ctx, modules={module})
    ends = list(accumulate(len(own) for own in theirs))

    def pieces(of: list[Prompt]) -> list[torch.Tensor]:
        batch = prompt_batch(of, -1 if image_token is None else image_token, model)
        packed = ours.language.logits(ours.eval().transform(batch, ours.packing(batch)))
        return [packed[end - len(own) : end] for own, end in zip(theirs, ends, strict=True)]

    found = pieces(prompts)
    others = pieces([_inverted(prompt) for prompt in prompts]) if any(prompt.sizes for prompt in prompts) else found
    return [
        LogitProof(
            _describe(prompt),
            len(own),
            float((piece - own).abs().max()),
            float(own.abs().max()),
            float((piece - other).abs().max()) if prompt.sizes else None,
        )
        for prompt, own, piece, other in zip(prompts, theirs, found, others, strict=True)
    ]


def _inverted(prompt: Prompt) -> Prompt:
    """The same with every pixel inverted."""
    tiles, pixels = (None if own is None else 255 - own for own in (prompt.tiles_TCHW, prompt.pixels_X))
    return replace(prompt, tiles_TCHW=tiles, pixels_X=pixels)


def _describe(prompt: Prompt) -> str:
    sizes = [f"{width} x {height}" for width, height in prompt.sizes or []]
    return "text" if not sizes else f"{len(sizes)} picture{'s' * (len(sizes) > 1)}: {', '.join(sizes)}"


def _check_same_model(checkpoint: Path, model: ModelConfig) -> None:
    """Everything of the model block that shapes the network must agree."""
    stored = folders.read_state(checkpoint).get("model")
    if stored is None:
        return
    ours = ModelConfig.model_validate(stored)
    here, there = network(ours), network(model)
    if ours.family != model.family:
        raise HuggingFaceError(f"{checkpoint} and the folder hold different families: {ours.family} and {model.family}")
    names = [name for name in here | there if here.get(name) != there.get(name)]
    if names:
        differing = [f"model.{name}: {here.get(name)!r} in the checkpoint, {there.get(name)!r} in the folder" for name in names]
        raise HuggingFaceError(f"{checkpoint} and the folder hold different models: " + some(differing, limit=3))
