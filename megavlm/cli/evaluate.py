"""`megavlm evaluate`: measure a trained model on held-out data."""
