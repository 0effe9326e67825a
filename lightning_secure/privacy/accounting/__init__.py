"""Epsilon: accountants, the ledger of a run, its journal."""
