"""Tokenizers behind one small interface: SentencePiece model files and Hugging Face `tokenizer.json` folders.

Training needs three things that the libraries do not give alike: character offsets (the loss mask comes from spans of the
rendered text), `decode` as the exact inverse of `encode` (the mask is verified by it), and special tokens that are split
off in the same places whichever library encodes. Both classes here give all three, and `save_hf` writes a Hugging Face
tokenizer with the same ids.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megavlm.data.sample import IMAGE_TOKEN
from megavlm.data.sentencepiece_export import SPACE, SPECIAL_TYPES, TokenizerError, is_marker, to_tokenizers
from megavlm.data.token_files import read_json, read_text, read_tokenizer

"""What stands for a picture in the data's messages; also the name of our own tokenizers' placeholder."""
_HF_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_HF_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoding:
    """Token ids with the half-open range of characters that each came from."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """Tokens of a character that was split into bytes all carry that character's range."""


class Tokenizer(ABC):
    """Text to ids and back. Thread-safe; adds no token by itself (chat templates write bos and eos as text)."""

    vocab_size: int
    """Highest id + 1."""
    special_ids: dict[str, int]
    """Text of every special token -> id. These texts are never split or merged with their surroundings."""
    bos_token: str
    """"" where the tokenizer has none."""
    eos_token: str
    pad_token: str
    named_tokens: dict[str, str]
    """Those of bos_token, eos_token, unk_token, sep_token, pad_token, cls_token and mask_token that there are: what Hugging Face's chat
    templates may use."""
    image_token: str
    """Special token that visual features replace; recipe.data.image_token."""
    image_token_is_added: bool = False
    """The tokenizer came without `image_token`, and got it as its last token."""
    fingerprint: str
    """Changes whenever the ids of some text could change."""

    @abstractmethod
    def encode(self, text: str) -> Encoding:
        """Ids of `text` with character offsets; special tokens' texts become their ids."""

    @abstractmethod
    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of `ids`, spaces at either end kept; special tokens are written out unless `skip_special`."""

    @abstractmethod
    def save_hf(self, folder: str | Path, chat_template: str | None = None) -> None:
        """Write a Hugging Face tokenizer that gives the same ids, with `chat_template` (Jinja) where given."""

    def chat_template(self) -> str | None:
        """The Jinja chat template that came with the tokenizer; None where there is none."""
        return None

    def num_rows(self, *, text_only: bool) -> int:
        """Rows that an embedding needs; a model without pictures needs none for an added image token."""
        return self.vocab_size - int(text_only and self.image_token_is_added)

    @property
    def image_token_id(self) -> int:
        """Id of the image placeholder."""
        return self.token_id(self.image_token)

    @property
    def bos_id(self) -> int | None:
        return self.special_ids.get(self.bos_token)

    @property
    def eos_id(self) -> int | None:
        return self.special_ids.get(self.eos_token)

    @property
    def pad_id(self) -> int:
        """Id that fills the end of a pack; never attended to by a sample, so any id does where the tokenizer names none."""
        for token in (self.pad_token, self.eos_token):
            if token in self.special_ids:
                return self.special_ids[token]
        return 0

    def token_id(self, token: str) -> int:
        """Id of one special token. Raises TokenizerError when the tokenizer lacks it."""
        if token not in self.special_ids:
            known = ", ".join(list(self.special_ids)[:20])
            raise TokenizerError(
                f"the tokenizer has no special token {token!r} (it has: {known}). Train it with this token among the special tokens,"
                " or choose a data.chat_template that does not need it"
            )
        return self.special_ids[token]

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        """Longest special token first: what Hugging Face's added-token automaton (leftmost-longest) finds."""
        return re.compile("|".join(re.escape(t) for t in sorted(self.special_ids, key=len, reverse=True)) or r"(?!)")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with identity normalisation (Llama, Mistral, Gemma and our own).

    Control and user-defined symbols are split off first, as Hugging Face does with added tokens; the text between is encoded
    piece by piece. A model trained with a dummy prefix gets it at the start of the text only (Hugging Face: prepend_scheme
    "first").

    Raises:
        TokenizerError: the model changes text before encoding it, so that ids could not be mapped back to characters.
    """

    def __init__(self, path: str | Path, image_token: str = IMAGE_TOKEN) -> None:
        import sentencepiece as spm
        from sentencepiece import sentencepiece_model_pb2 as spm_proto

        self.path = Path(path)
        raw = self.path.read_bytes()
        model = spm_proto.ModelProto()  # type: ignore[attr-defined] # generated at import
        try:
            model.ParseFromString(raw)
        except Exception as error:  # protobuf's DecodeError lives at different addresses in different versions
            raise TokenizerError(f"{path} is not a SentencePiece model: {error}") from error
        norm = model.normalizer_spec
        rewrites = {
            "a normalisation table": bool(norm.precompiled_charsmap),
            "remove_extra_whitespaces": norm.remove_extra_whitespaces,
            "escape_whitespaces=false": not norm.escape_whitespaces,
            "treat_whitespace_as_suffix": model.trainer_spec.treat_whitespace_as_suffix,
        }
        if any(rewrites.values()):
            raise TokenizerError(
                f"{path} rewrites text before encoding ({', '.join(k for k, v in rewrites.items() if v)}): loss masks could not be checked"
                " against the text. Train it with normalization_rule_name=identity and remove_extra_whitespaces=false, or convert it to a"
                " Hugging Face folder"
            )
        self._dummy_prefix = bool(norm.add_dummy_prefix)
        norm.add_dummy_prefix = False  # done here, so that text after a special token gets none
        self._model = model
        self._spm = spm.SentencePieceProcessor()
        self._spm.LoadFromSerializedProto(model.SerializeToString())
        self.vocab_size = len(model.pieces)
        self.special_ids = {p.piece: i for i, p in enumerate(model.pieces) if p.type in SPECIAL_TYPES and p.piece}
        self.bos_token, self.eos_token, self.pad_token = (
            self._piece(i) for i in (self._spm.bos_id(), self._spm.eos_id(), self._spm.pad_id())
        )
        names = {"bos": self.bos_token, "eos": self.eos_token, "unk": self._piece(self._spm.unk_id()), "pad": self.pad_token}
        self.named_tokens = {f"{name}_token": token for name, token in names.items() if token}
        self._special_texts = {i: t for t, i in self.special_ids.items()}
        self.image_token = image_token
        self.fingerprint = _fingerprint(b"spm-1" + raw, image_token)

    def _piece(self, index: int) -> str:
        return str(self._model.pieces[index].piece) if index >= 0 else ""

    def encode(self, text: str) -> Encoding:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for match in self._special_pattern.finditer(text):
            self._encode_plain(text[start : match.start()], start, ids, offsets)
            ids.append(self.special_ids[match.group()])
            offsets.append(match.span())
            start = match.end()
        self._encode_plain(text[start:], start, ids, offsets)
        return Encoding(ids, offsets)

    def _encode_plain(self, text: str, start: int, ids: list[int], offsets: list[tuple[int, int]]) -> None:
        if not text:
            return
        # As Hugging Face's Metaspace: a text that begins with a space has its prefix already.
        prefix = 1 if self._dummy_prefix and start == 0 and text[0] not in (" ", SPACE) else 0
        encoded = self._spm.encode(" " * prefix + text, return_type="offset_mapping")
        ids.extend(encoded["ids"])
        for begin, end in encoded["offsets"]:
            # SentencePiece gives all bytes of a character but the last an empty range in front of it.
            end = max(end, begin + 1)
            offsets.append((max(begin - prefix, 0) + start, max(end - prefix, 0) + start))

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        parts: list[str] = []
        run: list[int] = []
        for token in [int(i) for i in ids]:
            if token in self._special_texts:
                parts += [self._spm.decode(run) if run else "", "" if skip_special else self._special_texts[token]]
                run = []
            else:
                run.append(token)
        return "".join(parts) + (self._spm.decode(run) if run else "")

    def save_hf(self, folder: str | Path, chat_template: str | None = None) -> None:
        from tokenizers import AddedToken
        from transformers import PreTrainedTokenizerFast

        backend = to_tokenizers(self._model, self._dummy_prefix)
        # A user-defined piece may be ordinary text (runs of spaces, HTML tags): generation must not drop it as "special".
        kinds = {p.piece: p.type for p in self._model.pieces}
        markers = [t for t in self.special_ids if t == self.image_token or is_marker(t, kinds[t])]
        backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in self.special_ids if t not in markers])
        backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in markers])
        named = {k: v for k, v in (("bos_token", self.bos_token), ("eos_token", self.eos_token), ("pad_token", self.pad_token)) if v}
        unknown = self._piece(self._spm.unk_id())
        fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=backend,
            unk_token=unknown or None,
            additional_special_tokens=[t for t in markers if t not in (unknown, *named.values())],
            clean_up_tokenization_spaces=False,
            **named,
        )
        fast.save_pretrained(str(folder))
        _write_chat_template(folder, chat_template)


class HuggingFaceTokenizer(Tokenizer):
    """A folder with `tokenizer.json` (and `tokenizer_config.json` for the names of bos, eos and pad).

    A tokenizer without "<image>" gets it as one more token: its embedding row is never read, since visual features replace it.

    Raises:
        TokenizerError: the folder has no tokenizer.json, or its tokenizer lacks an `image_token` of another name.
    """

    def __init__(self, folder: str | Path, image_token: str = IMAGE_TOKEN) -> None:
        import tokenizers

        self.folder = Path(folder)
        self._tok = read_tokenizer(self.folder, "data.tokenizer takes a *.model file, or")
        self._tok.no_truncation()
        self._tok.no_padding()
        config_file = self.folder / "tokenizer_config.json"
        self._config: dict[str, Any] = read_json(config_file) if config_file.is_file() else {}
        self.image_token = image_token
        if image_token == IMAGE_TOKEN and image_token not in {t.content for t in self._tok.get_added_tokens_decoder().values()}:
            self._tok.add_special_tokens([tokenizers.AddedToken(image_token, normalized=False, special=True)])
            self.image_token_is_added = True
            log.info("%s has no %s token: added as id %d", folder, image_token, self._tok.token_to_id(image_token))
        added = self._tok.get_added_tokens_decoder()
        self.special_ids = {t.content: i for i, t in added.items()}
        self.vocab_size = max(self._tok.get_vocab(with_added_tokens=True).values()) + 1
        self.named_tokens = {name: token for name in _HF_NAMES if (token := self._named(name))}
        self.bos_token, self.eos_token, self.pad_token = (self.named_tokens.get(k, "") for k in ("bos_token", "eos_token", "pad_token"))
        if image_token not in self.special_ids:
            raise TokenizerError(
                f"data.image_token={image_token!r} is no special token of {folder}: name the one that stands for a picture's features"
                f" (it has: {', '.join(list(self.special_ids)[:30])})"
            )
        names = json.dumps([self.bos_token, self.eos_token, self.pad_token])
        self.fingerprint = _fingerprint(("hf-1" + self._tok.to_str() + names).encode(), image_token)

    def _named(self, key: str) -> str:
        value = self._config.get(key)
        text = value.get("content", "") if isinstance(value, dict) else (value or "")
        if text and text not in self.special_ids and key in ("bos_token", "eos_token", "pad_token"):
            raise TokenizerError(
                f"{self.folder}/tokenizer_config.json names {key}={text!r}, which tokenizer.json does not have as an added token"
            )
        return str(text)

    def chat_template(self) -> str | None:
        """The folder's chat template: chat_template.jinja, else the processor's chat_template.json, else tokenizer_config.json; where
        several are named, "default" (transformers, `PreTrainedTokenizerBase.get_chat_template`).

        Raises:
            TokenizerError: several templates, none of them "default".
        """
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return read_text(file)
        file = self.folder / "chat_template.json"
        config = read_json(file) if file.is_file() else self._config
        found = config.get("chat_template")
        if isinstance(found, list):
            found = {t["name"]: t["template"] for t in found}
        if isinstance(found, dict):
            if "default" not in found:
                raise TokenizerError(
                    f'{self.folder} has the chat templates {", ".join(found)} and none named "default": give a *.jinja file'
                )
            found = found["default"]
        return found

    def encode(self, text: str) -> Encoding:
        encoded = self._tok.encode(text, add_special_tokens=False)
        return Encoding(encoded.ids, encoded.offsets)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        kept = list(map(int, ids))
        if skip_special:
            special = set(self.special_ids.values())
            kept = [i for i in kept if i not in special]
        # Many decoders strip the first space of a text; behind a special token nothing is "first".
        text: str = self._tok.decode([self.image_token_id, *kept], skip_special_tokens=False)
        return text.removeprefix(self.image_token)

    def save_hf(self, folder: str | Path, chat_template: str | None = None) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in _HF_FILES[1:]:
            if (self.folder / name).is_file() and self.folder.resolve() != Path(folder).resolve():
                shutil.copyfile(self.folder / name, Path(folder) / name)
        self._tok.save(str(Path(folder) / "tokenizer.json"))
        if not (Path(folder) / "tokenizer_config.json").is_file():
            text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}, indent=2)
            (Path(folder) / "tokenizer_config.json").write_text(text)
        _write_chat_template(folder, chat_template)


def _write_chat_template(folder: str | Path, template: str | None) -> None:
    if template is not None:
        (Path(folder) / "chat_template.jinja").write_text(template)


def _fingerprint(content: bytes, image_token: str) -> str:
    return hashlib.sha256(content + (b"" if image_token == IMAGE_TOKEN else image_token.encode())).hexdigest()[:16]


def load_tokenizer(path: str | Path, image_token: str = IMAGE_TOKEN) -> Tokenizer:
    """Tokenizer of recipe.data.tokenizer: a *.model file (SentencePiece) or a folder (Hugging Face).

    Args:
        path: the file or folder.
        image_token: recipe.data.image_token, the special token that visual features replace.

    Raises:
        TokenizerError: the path is empty, missing or neither; or the tokenizer has no such image token.
    """
    if not str(path):
        raise TokenizerError("data.tokenizer is empty: give a SentencePiece *.model file or a Hugging Face folder with tokenizer.json")
    where = Path(path)
    if where.is_dir():
        return HuggingFaceTokenizer(where, image_token)
    if where.is_file():
        return SentencePieceTokenizer(where, image_token)
    raise TokenizerError(f"data.tokenizer={str(path)!r} does not exist")


def train_sentencepiece(texts: Iterable[str], path: str | Path, vocab_size: int, special_tokens: Sequence[str]) -> SentencePieceTokenizer:
    """Train a BPE SentencePiece model that encodes any text losslessly, and write it to `path`.

    Identity normalisation and no dummy prefix (text in = text out), byte fallback (no unknown token), digits one by one,
    special tokens as user-defined symbols. `vocab_size` is an upper limit: a small corpus yields fewer pieces.

    Raises:
        TokenizerError: special_tokens lacks "<image>", or vocab_size has no room for bytes and special tokens.
    """
    import sentencepiece as spm

    if IMAGE_TOKEN not in special_tokens:
        raise TokenizerError(f"special_tokens must contain {IMAGE_TOKEN!r}")
    fixed = 4 + 256 + len(special_tokens)
    if vocab_size <= fixed:
        raise TokenizerError(
            f"vocab_size={vocab_size} must exceed {fixed}: 4 control tokens, 256 bytes and {len(special_tokens)} special tokens"
        )
    pattern = re.compile("|".join(re.escape(t) for t in sorted(special_tokens, key=len, reverse=True)))
    sentences = (part for text in texts for part in re.split(r"(?<=\n)", pattern.sub("\n", text)) if part.strip())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        spm.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=file,
            vocab_size=vocab_size,
            model_type="bpe",
            hard_vocab_limit=False,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            user_defined_symbols=list(special_tokens),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            max_sentence_length=1 << 20,
            minloglevel=2,
        )
    return SentencePieceTokenizer(path)
