"""Promises the other packages made, kept through the user's door."""
