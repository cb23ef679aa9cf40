"""See tests/conftest.py for the tiers."""
