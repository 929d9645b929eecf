"""What crosses a process border: job specifications, jobs, stages, events, artifacts and errors."""
