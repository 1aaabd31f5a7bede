"""`megavlm convert`: between Hugging Face folders and megavlm's checkpoints."""
