"""Rows to token batches: formats, packing, deterministic order."""
