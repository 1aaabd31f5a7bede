"""`megavlm generate`: ask a trained model about pictures."""
