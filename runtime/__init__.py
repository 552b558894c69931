"""What any long-running program of many processes needs; nothing here knows Pythia."""
