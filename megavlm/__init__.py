"""megavlm: train large vision-language models on megatron-core, and prove that what was trained is right."""

import warnings

from megavlm.quick_import import install

__version__ = "0.1.0"

# megatron-core warns at import, several times, that Transformer Engine and Apex are missing. `megavlm doctor` says it once, with
# what it costs.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron\.")

install()
