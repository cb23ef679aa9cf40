"""Other people's engines and tools, each in an environment of its own under ``.bench/``."""
