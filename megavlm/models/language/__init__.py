"""The language model: megatron-core's GPTModel fed with embeddings."""

from megavlm.models.language.model import LanguageModel, padded_vocab_size, weight_of

__all__ = ["LanguageModel", "padded_vocab_size", "weight_of"]
