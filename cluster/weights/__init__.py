"""The weight plane: versions in the cluster's object store, from trainers to replicas."""
