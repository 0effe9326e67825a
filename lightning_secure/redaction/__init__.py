"""Finding secrets and personal data, and taking them out."""
