"""What a job found, for people: figures, a page that holds them, and the checkpoints' model cards."""
