"""What stages read from outside: models, texts and their windows, through faults that may pass."""
