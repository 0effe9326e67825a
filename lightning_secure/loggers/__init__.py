"""``Trainer(logger=)``: tracking without secrets and personal data."""
