"""What made the bundled models; run from the root of the repository, and not installed."""
