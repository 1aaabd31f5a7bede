"""Vision encoders."""

from megavlm.models.vision.canvas import CanvasEncoder
from megavlm.models.vision.encoder import VisionEncoder
from megavlm.models.vision.features import Features
from megavlm.models.vision.side_by_side import SideBySide, build_encoder

__all__ = ["CanvasEncoder", "Features", "SideBySide", "VisionEncoder", "build_encoder"]
