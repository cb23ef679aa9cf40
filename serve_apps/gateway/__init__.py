"""The one public door: who asks, may they, how much is left, where does it go."""
