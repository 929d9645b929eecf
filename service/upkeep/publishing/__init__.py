"""Hands finished jobs on: to MLflow, and to the Hugging Face hub."""
