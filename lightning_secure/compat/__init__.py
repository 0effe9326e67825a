"""Private attributes of Lightning, torch and MLflow that this package touches, each in one place.

An upgrade that renames one of them breaks a file here, and no other.
"""
