"""Kills and exhaustion, minutes each: before a release."""
