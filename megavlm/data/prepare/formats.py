"""All formats by name."""

from __future__ import annotations

from megavlm.data.prepare.captions import Captions
from megavlm.data.prepare.coco import Coco
from megavlm.data.prepare.conversations import Llava, Messages
from megavlm.data.prepare.interleaved import Interleaved
from megavlm.data.prepare.types import Format
from megavlm.data.prepare.video import Frames, Video
from megavlm.data.prepare.vqa import Vqa
from megavlm.data.prepare.wds import WebDatasetTars

FORMATS: dict[str, type[Format]] = {
    kind.name: kind for kind in (Llava, Messages, Captions, Interleaved, WebDatasetTars, Vqa, Coco, Video, Frames)
}
