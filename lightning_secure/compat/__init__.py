"""Private attributes of Lightning, torch and MLflow that this package reads or exchanges.

Most are here, so that an upgrade that renames one breaks few files. Base classes, and what one file
alone needs, stay where they are used.
"""
