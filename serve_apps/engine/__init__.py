"""The engine: from token ids to token ids, on one or more ranks."""
