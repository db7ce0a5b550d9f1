"""Everything the command line knows: methods, scenarios and settings."""
