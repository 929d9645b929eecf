"""Logs, traces and metrics of every process, and what keeps secrets out of them."""
