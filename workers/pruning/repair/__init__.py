"""Making up for what went: merging pairs of blocks, and healing on the dense model."""
