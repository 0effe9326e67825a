"""Encrypted shards, and how Lightning reads them."""
