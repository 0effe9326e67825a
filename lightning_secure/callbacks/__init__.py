"""``Trainer(callbacks=)``: they observe, report or stop; no guarantee lives here."""
