"""Life in a batch system."""
