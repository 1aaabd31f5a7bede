"""Hugging Face folders: the only place that knows their parameter names."""

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.config import config_from_hf, config_to_hf
from megavlm.checkpoint.hf.export import Exported, export_hf
from megavlm.checkpoint.hf.load import hf_provider, load_hf
from megavlm.checkpoint.hf.texts import check_pictures, image_config_from_hf

__all__ = [
    "Exported",
    "HuggingFaceError",
    "check_pictures",
    "config_from_hf",
    "config_to_hf",
    "export_hf",
    "hf_provider",
    "image_config_from_hf",
    "load_hf",
]
