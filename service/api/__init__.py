"""The HTTP interface: one router a noun, and what they share (problems, keys, dependencies)."""
