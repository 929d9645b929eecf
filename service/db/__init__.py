"""Metadata: tables, the queries on them, and the migrations that create them."""
