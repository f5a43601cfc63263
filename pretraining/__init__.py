"""Scripts that made the bundled models; run from the root of the repository, not installed."""
