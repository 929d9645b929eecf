"""What measures the service and the method; RESULTS.md is what it printed."""
