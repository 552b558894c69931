"""Text, tokens on disk, and the published order."""
