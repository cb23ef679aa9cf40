"""Figures of merit in plain Python: no download, no torch, the same on every machine."""
