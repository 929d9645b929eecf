"""The GPU side: runs the stages of jobs."""
