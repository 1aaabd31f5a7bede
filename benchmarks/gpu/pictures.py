"""Data made on the spot: photographs of scikit-learn cut at random, with texts of the documentation, in shards as users write them."""

from __future__ import annotations

import io
import random
import re
from pathlib import Path

from gpu.runner import ROOT

NUM_PICTURES = 48
VOCABULARY = 1024


def make_data(folder: Path, num_samples: int, words: tuple[int, int], sides_px: tuple[int, int]) -> None:
    """Shards in `folder`/photos and a tokenizer beside them; nothing where they are there already.

    Args:
        words: fewest and most words of a question, and again of an answer.
        sides_px: the same of a picture's sides.
    """
    from megavlm.data.chat import TEMPLATES
    from megavlm.data.shards import ShardWriter
    from megavlm.data.tokenizer import train_sentencepiece

    if (folder / "photos").is_dir():
        return
    rng = random.Random(0)
    text = _words()
    folder.mkdir(parents=True, exist_ok=True)
    train_sentencepiece([" ".join(text[i : i + 40]) for i in range(0, len(text), 40)], folder / "tokenizer.model", VOCABULARY,
                        TEMPLATES["megavlm"].special_tokens)  # fmt: skip
    pictures = [_cut(rng, sides_px) for _ in range(NUM_PICTURES)]

    def passage() -> str:
        number = rng.randint(*words)
        start = rng.randrange(len(text) - number)
        return " ".join(text[start : start + number])

    with ShardWriter(folder / "photos") as writer:
        for i in range(num_samples):
            messages = [{"role": "user", "content": f"<image>\n{passage()}"}, {"role": "assistant", "content": passage()}]
            writer.write(f"photo-{i:06d}", {"task": "caption", "split": "train", "messages": messages}, [rng.choice(pictures)], ["jpg"])


def _words() -> list[str]:
    """Words of the documentation, in their order."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return re.findall(r"[A-Za-z][a-z']+", " ".join(file.read_text(encoding="utf-8") for file in files))


def _cut(rng: random.Random, sides_px: tuple[int, int]) -> bytes:
    """A random part of a photograph as JPEG, enlarged where it is smaller than the sides that were drawn."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    whole = Image.fromarray(rng.choice(load_sample_images().images))
    width, height = (rng.randint(*sides_px) for _ in range(2))
    scale = min(whole.width / width, whole.height / height, 1.0)
    cut_width, cut_height = int(width * scale), int(height * scale)
    left, upper = rng.randint(0, whole.width - cut_width), rng.randint(0, whole.height - cut_height)
    part = whole.crop((left, upper, left + cut_width, upper + cut_height)).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    part.save(file, "JPEG", quality=90)
    return file.getvalue()
