"""Plugins that are useful to any method."""
