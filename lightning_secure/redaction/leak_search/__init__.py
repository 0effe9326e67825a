"""The search for planted values in what a run left behind."""
