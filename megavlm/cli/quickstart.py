"""`megavlm quickstart`: make data, train, measure, export: the whole of megavlm on a laptop."""
