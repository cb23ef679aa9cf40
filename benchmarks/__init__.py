"""Programs that measure, each with its committed result under ``results/``."""
