"""Files for cluster launchers, rendered from one cluster configuration."""
