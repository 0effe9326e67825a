"""New keys for a dataset, while runs read it."""
