"""An InstructBLIP folder with both tokenizers, imported and exported again: our answers are transformers', processor and all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megavlm.checkpoint.hf import export_hf
from megavlm.checkpoint.hf.config import config_from_hf
from megavlm.checkpoint.hf.importing import import_hf
from megavlm.checkpoint.hf.reading import quiet_transformers
from megavlm.checkpoint.hf.registry import family
from megavlm.config.schema import ImageConfig
from megavlm.data.instructions import FOLDER
from megavlm.inference.load import load_for_inference
from megavlm.testing.families.blip import CASES
from megavlm.testing.families.case import make_hf
from megavlm.testing.pool import RankPool
from tests.unit.checkpoint.test_hf_blip import make_tokenizer
from tests.unit.data.test_data_instructions import make_words

QUESTION = "is it red ? answer :"


def make_folder(folder: Path) -> None:
    make_hf(next(case for case in CASES if case.family == "instructblip"), folder)
    tokenizer, model = make_tokenizer(folder), config_from_hf(folder)
    make_words(folder / FOLDER)
    for name, content in family("instructblip").processor_files(model, ImageConfig(fit="stretch"), tokenizer).items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def convert(folder: Path, root: Path) -> None:
    import_hf(folder, root / "checkpoint")
    export_hf(root / "checkpoint", root / "out")


def answers(folder: Path, questions: list[str]) -> list[list[int]]:
    loaded = load_for_inference(folder, device="cpu")
    prompts = [loaded.prompt(text, [picture(i)]) for i, text in enumerate(questions)]
    return loaded.generate(prompts, max_new_tokens=12)


def test_chain(pool: RankPool, tmp_path: Path) -> None:
    make_folder(tmp_path / "hf")
    pool.run(convert, tmp_path / "hf", tmp_path)
    out = tmp_path / "out"
    for name in ("tokenizer.json", f"{FOLDER}/tokenizer.json", "processor_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name
    tf = quiet_transformers()
    processor, hf = tf.AutoProcessor.from_pretrained(str(out)), tf.InstructBlipForConditionalGeneration.from_pretrained(str(out)).eval()
    questions = [QUESTION, "what ?"]
    ours = pool.run(answers, out, questions)[0]
    for i, text in enumerate(questions):
        inputs = processor(images=picture(i), text=text, return_tensors="pt")
        with torch.no_grad():
            theirs = hf.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :].tolist()
        assert ours[i] == theirs
    assert ours[0] != ours[1]
