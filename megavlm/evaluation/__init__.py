"""Measure a trained model: held-out answers with the right, a swapped and no picture; agreement with Hugging Face."""
