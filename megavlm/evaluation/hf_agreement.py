"""Our model against Hugging Face's on real samples, each through its own whole path.

Ours: our chat template, tokenizer, tiles, packed forward pass. Theirs: the folder's chat template, processor and
`LlavaForConditionalGeneration`, loaded as anybody would. Token ids must be equal; pixels and logits are compared as numbers.

Shape legend: L tokens of a sample, V vocabulary, T tiles, C channels, H height, W width.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from megavlm.checkpoint.hf.config import quiet_transformers
from megavlm.data.decode import to_rgb
from megavlm.data.prompt import Prompt, prompt_batch
from megavlm.evaluation.pictures import write_comparison
from megavlm.evaluation.questions import EvaluationError, Question
from megavlm.inference.loaded import LoadedModel
from megavlm.inference.prompts import make_prompt


class AgreementError(ValueError):
    """The two paths cannot be compared, or do not even see the same tokens."""


@dataclass(frozen=True)
class SampleAgreement:
    """One question, both ways."""

    key: str
    task: str
    question: str
    reference: str
    ours: str
    """Our greedy answer."""
    theirs: str
    """Hugging Face's."""
    same_tokens: bool
    """The two answers are the same ids."""
    max_logit_difference: float
    """Over all positions of the prompt, in fp32."""
    max_logit: float
    """Largest absolute logit: the scale of the difference."""
    max_pixel_difference: float
    """Between normalised pixels; 0 without pictures."""


@dataclass(frozen=True)
class Agreement:
    """All samples; the example's pictures are kept to be shown."""

    samples: tuple[SampleAgreement, ...]
    pictures: tuple[bytes, ...] = field(repr=False)
    """Of `example`."""
    example: SampleAgreement

    @property
    def max_logit_difference(self) -> float:
        return max(s.max_logit_difference for s in self.samples)

    @property
    def max_pixel_difference(self) -> float:
        return max(s.max_pixel_difference for s in self.samples)

    @property
    def num_same_answers(self) -> int:
        return sum(s.same_tokens for s in self.samples)

    def summary(self) -> str:
        """What a reader of the log needs."""
        one = self.example
        return "\n".join(
            [
                f"Hugging Face agrees on {len(self.samples)} samples: token ids equal, pixels within {self.max_pixel_difference:.1e}, "
                f"logits within {self.max_logit_difference:.1e} (of up to {max(s.max_logit for s in self.samples):.1f}), "
                f"{self.num_same_answers} of {len(self.samples)} greedy answers the same",
                f"  {one.task}: {one.question!r}  right: {one.reference!r}  megavlm: {one.ours!r}  Hugging Face: {one.theirs!r}",
            ]
        )

    def write(self, folder: str | Path) -> None:
        """hf_agreement.json and, for an example with pictures, hf_agreement.png in `folder`, created when missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        values = {
            "max_logit_difference": self.max_logit_difference,
            "max_pixel_difference": self.max_pixel_difference,
            "same_answers": self.num_same_answers,
            "samples": [asdict(s) for s in self.samples],
        }
        (folder / "hf_agreement.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        if self.pictures:
            one = self.example
            lines = [f"right: {one.reference}", f"megavlm: {one.ours}", f"Hugging Face: {one.theirs}"]
            write_comparison(self.pictures, one.question, lines, folder / "hf_agreement.png")


def compare_with_hf(loaded: LoadedModel, hf_folder: str | Path, questions: Sequence[Question], *, max_new_tokens: int = 32) -> Agreement:
    """Run each question through both paths in fp32: logits of every position of the prompt, and the greedy answers.

    The example is the first question with a picture. `loaded` must be fp32; any tensor-parallel size (rank by rank the same).

    Raises:
        AgreementError: the model is not fp32, or token ids or numbers of pixels differ (names the sample and the first place).
        EvaluationError: no question.
    """
    if not questions:
        raise EvaluationError("no question to compare on")
    if loaded.recipe.precision.dtype != "fp32":
        raise AgreementError(f"the model is loaded in {loaded.recipe.precision.dtype}: load it with dtype='fp32' to compare")
    device = loaded.model.ctx.device
    transformers = quiet_transformers()
    transformers.utils.logging.disable_progress_bar()
    processor_class: Any = transformers.AutoProcessor
    processor = processor_class.from_pretrained(hf_folder, trust_remote_code=False)
    model_class: Any = transformers.LlavaForConditionalGeneration
    hf_model = model_class.from_pretrained(hf_folder, dtype=torch.float32, use_safetensors=True).to(device).eval()
    samples = [_compare(loaded, hf_model, processor, q, max_new_tokens) for q in questions]
    chosen = next((i for i, q in enumerate(questions) if q.num_pictures), 0)
    return Agreement(tuple(samples), tuple(questions[chosen].pictures()), samples[chosen])


@torch.no_grad()
def _compare(loaded: LoadedModel, hf_model: Any, processor: Any, question: Question, max_new_tokens: int) -> SampleAgreement:
    pictures = question.pictures()
    prompt = make_prompt(question.messages, pictures, chat=loaded.chat, data=loaded.recipe.data, model=loaded.recipe.model)
    text = processor.apply_chat_template(list(question.messages), tokenize=False, add_generation_prompt=True)
    decoded = [to_rgb(Image.open(io.BytesIO(p))) for p in pictures]
    # The template has written every special token already: the tokenizer must not add its own.
    inputs = processor(text=[text], images=decoded or None, return_tensors="pt", add_special_tokens=False).to(loaded.model.ctx.device)
    _check_same_ids(question, list(prompt.ids), inputs["input_ids"][0].tolist())
    pixel_difference = _pixel_difference(loaded, question, prompt, inputs.get("pixel_values"))
    ours_LV, theirs_LV = prompt_logits(loaded, prompt), hf_model(**inputs).logits[0].float()
    our_answer = loaded.generate([prompt], max_new_tokens=max_new_tokens)[0]
    stops = loaded.chat.stop_ids
    generated = hf_model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stops, pad_token_id=stops[0])
    their_answer = generated[0, len(prompt.ids) :].tolist()
    return SampleAgreement(
        key=question.key,
        task=question.task,
        question=question.text,
        reference=question.reference,
        ours=loaded.text(our_answer),
        theirs=loaded.text(their_answer),
        same_tokens=our_answer == their_answer,
        max_logit_difference=float((ours_LV - theirs_LV).abs().max()),
        max_logit=float(theirs_LV.abs().max()),
        max_pixel_difference=pixel_difference,
    )


@torch.no_grad()
def prompt_logits(loaded: LoadedModel, prompt: Prompt) -> torch.Tensor:
    """Logits (L, V) in fp32 at every position of a prompt."""
    model = loaded.model
    batch = prompt_batch([prompt], loaded.tokenizer.image_token_id, model.model).to(model.ctx.device)
    return model.language.logits(model.transform(batch, model.packing(batch)))


def _check_same_ids(question: Question, ours: list[int], theirs: list[int]) -> None:
    if ours == theirs:
        return
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    raise AgreementError(
        f"sample {question.key!r}: our prompt has {len(ours)} tokens, Hugging Face's {len(theirs)}; the first difference is at {at}: "
        f"ours {ours[at : at + 8]}, theirs {theirs[at : at + 8]}. The exported tokenizer, chat template or number of visual tokens "
        "is not the model's own (LLaVA's processor knows one tile a picture: data.image.policy=fixed)"
    )


def _pixel_difference(loaded: LoadedModel, question: Question, prompt: Prompt, theirs: torch.Tensor | None) -> float:
    if prompt.tiles_TCHW is None:
        return 0.0
    vision = loaded.recipe.model.vision
    shape = tuple(prompt.tiles_TCHW.shape)
    if theirs is None or tuple(theirs.shape) != shape:
        got = "none" if theirs is None else tuple(theirs.shape)
        raise AgreementError(f"sample {question.key!r}: our tiles have shape {shape}, the processor's pixel values {got}")
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (vision.image_mean, vision.image_std))
    ours = (prompt.tiles_TCHW / 255.0 - mean) / std
    return float((ours - theirs.cpu().float()).abs().max())
