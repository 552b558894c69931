"""Every op of kernels/ beside its peers: pytest bench --benchmark-only."""
