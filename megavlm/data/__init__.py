"""The data's route: shards, index, mixture, packing, plan, materialise, loader (docs/data.md)."""
