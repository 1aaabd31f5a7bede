"""Vision encoders."""

from megavlm.models.vision.encoder import VisionEncoder
from megavlm.models.vision.features import Features

__all__ = ["Features", "VisionEncoder"]
