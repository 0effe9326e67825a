"""``Trainer(strategy=)``: where the privacy guarantee lives."""

from lightning_secure.strategies.registry import register_names

register_names()
