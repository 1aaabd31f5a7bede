"""Use a trained model: load it from a run or a Hugging Face folder, and generate."""
