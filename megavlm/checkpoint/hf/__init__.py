"""Hugging Face folders: the only place that knows their parameter names."""

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.config import config_from_hf, config_to_hf, image_config_from_hf
from megavlm.checkpoint.hf.export import Exported, export_hf
from megavlm.checkpoint.hf.families.base import TokenIds
from megavlm.checkpoint.hf.load import load_hf, start_from
from megavlm.checkpoint.hf.texts import check_pictures

__all__ = [
    "Exported",
    "HuggingFaceError",
    "TokenIds",
    "check_pictures",
    "config_from_hf",
    "config_to_hf",
    "export_hf",
    "image_config_from_hf",
    "load_hf",
    "start_from",
]
