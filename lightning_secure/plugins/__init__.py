"""``Trainer(plugins=)``: how checkpoints are written and read."""
