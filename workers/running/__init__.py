"""Running a stage: the attempt with its claim and lease, its scratch folder and its metrics."""
