"""What every long-running program with many processes needs. Nothing here knows Pythia."""
