"""megavlm: train large vision-language models on megatron-core, and prove that what was trained is right."""

__version__ = "0.1.0"
