"""Checks before the first step: what cannot be private is refused."""
