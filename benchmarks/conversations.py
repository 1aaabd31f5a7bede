"""Conversations a second and core: text, tokens, mask and its check, beside transformers' apply_chat_template on the same templates.

    python benchmarks/conversations.py [--out benchmarks/results/conversations.json]

Two conversations: `short`, one question about a picture and a number for an answer, and `long`, five exchanges of 20-80 words. A byte-level
BPE tokenizer trained here on such sentences. megavlm: Chat.encode_conversation (renders, tokenises, finds the spans, decodes them as the
check). transformers: apply_chat_template(return_dict=True), with return_assistant_tokens_mask where the template has `{% generation %}`; it
makes no mask for the others and checks none. Best of `--repeats` by CPU time, the two in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megavlm.data.chat import TEMPLATES, Chat
from megavlm.data.tokenizer import load_tokenizer
from megavlm.tracking.environment import environment_report

FOLDER = Path(__file__).parent.parent / "tests/unit/data/templates"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|end|>", "<|user|>", "<|assistant|>"]
SPECIAL += ["<|system|>"]
QUESTION = {"role": "user", "content": "<image>\nWhich number is written here?"}
SHORT = [QUESTION, {"role": "assistant", "content": "423"}]
LONG = SHORT + 4 * [
    {"role": "user", "content": "What else do you see in the picture, and where is it? " * 2},
    {"role": "assistant", "content": "There is a cat on the table and it looks at the number on the wall. " * 5},
]


def tokenizer_folder(folder: Path) -> Path:
    """A byte-level BPE tokenizer of 2000 pieces."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tok: Any = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    corpus = (m["content"].replace("<image>", "") for m in LONG for _ in range(50))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False))
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tok.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def per_second(work: Callable[[], object], seconds: float) -> float:
    """Calls a second of CPU time."""
    count, begin = 0, time.process_time()
    while (spent := time.process_time() - begin) < seconds:
        for _ in range(20):
            work()
        count += 20
    return count / spent


def as_parts(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    """As a user of transformers writes a picture."""
    text = QUESTION["content"].removeprefix("<image>\n")
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}, *messages[1:]]


def compare(name: str, folder: Path, messages: list[dict[str, str]], seconds: float, repeats: int) -> dict[str, float]:
    """Conversations a second, ours and theirs."""
    from transformers import AutoTokenizer

    chat = Chat(name, load_tokenizer(folder, "<|image_pad|>"))
    theirs, given = AutoTokenizer.from_pretrained(folder, trust_remote_code=False), as_parts(messages)
    options = {"chat_template": chat.jinja(), "return_dict": True, "return_assistant_tokens_mask": "endgeneration" in chat.jinja()}
    assert chat.encode_conversation(messages, [1]).ids_L.tolist() == theirs.apply_chat_template(given, **options)["input_ids"]
    best = {"megavlm": 0.0, "transformers": 0.0}
    for _ in range(repeats):
        best["megavlm"] = max(best["megavlm"], per_second(lambda: chat.encode_conversation(messages, [256]), seconds))
        best["transformers"] = max(best["transformers"], per_second(lambda: theirs.apply_chat_template(given, **options), seconds))
    tokens = len(chat.encode_conversation(messages, [1]).ids_L)
    return {
        "tokens": tokens,
        **{f"{k}_per_s": round(v) for k, v in best.items()},
        "ratio": round(best["megavlm"] / best["transformers"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = tokenizer_folder(Path(work))
        names = [*(n for n in ("megavlm", "chatml") if n in TEMPLATES), str(FOLDER / "qwen2_vl.jinja")]
        for name in names:
            for label, messages in (("short", SHORT), ("long", LONG)):
                row = compare(name, folder, messages, args.seconds, args.repeats)
                rows[f"{Path(name).stem}/{label}"] = row
                print(f"{Path(name).stem:<10} {label:<6} " + "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    if args.out is not None:
        command = "python benchmarks/conversations.py " + " ".join(sys.argv[1:])
        args.out.write_text(json.dumps({"command": command, "environment": environment_report(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
