"""``Trainer(strategy=)``: where the privacy guarantee lives."""
