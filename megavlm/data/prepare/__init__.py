"""`megavlm data prepare`: from the formats that data sets come in to shards (docs/data/formats.md)."""

from megavlm.data.prepare.formats import FORMATS
from megavlm.data.prepare.run import REPORT_NAME, PrepareReport, Progress, TooManyRefusedError, prepare
from megavlm.data.prepare.types import PrepareError, PrepareOptions

__all__ = ["FORMATS", "REPORT_NAME", "PrepareError", "PrepareOptions", "PrepareReport", "Progress", "TooManyRefusedError", "prepare"]
