"""Hugging Face folders: the only place that knows their parameter names."""

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.config import config_from_hf, config_to_hf
from megavlm.checkpoint.hf.export import Exported, export_hf
from megavlm.checkpoint.hf.load import hf_provider, load_hf

__all__ = ["Exported", "HuggingFaceError", "config_from_hf", "config_to_hf", "export_hf", "hf_provider", "load_hf"]
