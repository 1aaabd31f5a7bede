"""The JSON of one sample: its fields, its checks, and the hash of its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

IMAGE_TOKEN = "<image>"
"""Where a picture stands in a text. Tokenizers may call the token that stands for it otherwise (data.image_token)."""
MAX_KEY_BYTES = 255
"""Of a sample's name in UTF-8. The index keeps names in a column as wide as the longest: one of 4000 bytes would cost GBs."""


_compact = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


class ShardError(ValueError):
    """A shard or a sample in it that does not follow the format (docs/data.md)."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Message(_Strict):
    """One turn. "<image>" in the content stands for the next picture of the sample."""

    role: Literal["system", "user", "assistant"]
    content: str


class ImageEntry(_Strict):
    """One picture of a sample."""

    file: str
    """Member of the same shard: `{key}.{index}.{extension}`."""
    width: int = Field(gt=0)
    """Pixels after EXIF rotation."""
    height: int = Field(gt=0)
    sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    """Of the picture's encoded bytes, in hex; "" where nobody computed it. ShardWriter does."""
    time_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Of a video's frame: seconds from its beginning."""


class ObjectEntry(_Strict):
    """A labelled box; what the vision_classification objective learns from."""

    image: int = Field(ge=0)
    """Index into the sample's images."""
    label: int = Field(ge=0)
    box_px: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels of the picture after EXIF rotation; x1 and y1 are exclusive."""


class Sample(_Strict):
    """The JSON of one sample."""

    task: str = Field(min_length=1)
    split: str = Field(min_length=1)
    messages: list[Message] = Field(default_factory=list)
    images: list[ImageEntry] = Field(default_factory=list)
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Loss weight of the sample's targets."""
    objects: list[ObjectEntry] | None = None
    source: str = ""
    """Where the sample came from, for people and reports; plans go by data.sources."""
    scores: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)
    """Numbers about the sample (similarity, aesthetics, ...), for filtering."""
    meta: dict[str, Any] = Field(default_factory=dict)
    """Free; never read by training."""

    @model_validator(mode="after")
    def _check(self) -> Sample:
        marks = sum(m.content.count(IMAGE_TOKEN) for m in self.messages)
        if self.messages and marks != len(self.images):
            raise ValueError(f'the messages hold {marks} "{IMAGE_TOKEN}" but images has {len(self.images)} entries')
        for i, thing in enumerate(self.objects or []):
            if thing.image >= len(self.images):
                raise ValueError(f"objects[{i}].image={thing.image}, but the sample has {len(self.images)} images")
            x0, y0, x1, y1 = thing.box_px
            picture = self.images[thing.image]
            if not (0 <= x0 < x1 <= picture.width and 0 <= y0 < y1 <= picture.height):
                raise ValueError(f"objects[{i}].box_px={list(thing.box_px)} is empty or outside its {picture.width}x{picture.height} image")
        return self


def parse_sample(text: bytes | str, where: str) -> Sample:
    """Sample from its JSON.

    Raises:
        ShardError: not JSON, a wrong or unknown field; names `where` and the fields.
    """
    try:
        return Sample.model_validate_json(text)
    except ValidationError as error:
        raise ShardError(f"{where}: {_problems(error)}") from error


def check_sample(sample: Mapping[str, Any], where: str) -> Sample:
    """Sample from its fields. Raises ShardError as `parse_sample`."""
    try:
        return Sample.model_validate(dict(sample))
    except ValidationError as error:
        raise ShardError(f"{where}: {_problems(error)}") from error


def _problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(str(p) for p in e['loc']) or 'sample'}: {e['msg']}" for e in error.errors()[:5])


def content_hash(sample: Sample, image_sizes_bytes: Sequence[int]) -> tuple[bytes, bool]:
    """Hash of what a sample teaches, from its JSON and its pictures' sizes alone: 16 bytes, and whether it covers every byte.

    The first 16 bytes of the SHA-256 of the JSON (UTF-8, no spaces) of [[role, content] of each message, [image, label, box] of each
    object, pictures]; a picture is
    [width, height, time_s, its sha256] or, where the JSON does not say its sha256, [width, height, time_s, its size in bytes], and
    then the hash is weaker (False). Key, file names, task, split, source, weight, scores and meta do not enter: equal content under two
    names has one hash.
    """
    pictures = [
        [i.width, i.height, i.time_s, i.sha256 or size_bytes] for i, size_bytes in zip(sample.images, image_sizes_bytes, strict=True)
    ]
    objects = [[o.image, o.label, o.box_px] for o in sample.objects or []]
    content = [[[m.role, m.content] for m in sample.messages], objects, pictures]
    return hashlib.sha256(_compact(content).encode("utf-8", "surrogatepass")).digest()[:16], all(i.sha256 for i in sample.images)
