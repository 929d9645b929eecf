"""What is checked, and estimated, of a job before it is queued."""
