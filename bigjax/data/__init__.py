"""Data: sources -> records addressed by index -> grain.MapDataset -> dicts of numpy."""
