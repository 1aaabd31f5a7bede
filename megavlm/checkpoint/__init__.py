"""Sharded checkpoints that load into any parallel layout, and Hugging Face folders in and out."""
