"""Making up for what went: healing on the dense model's predictions."""
