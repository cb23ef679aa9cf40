"""What answers requests: the gateway, the releases, the replicas and their engine."""
