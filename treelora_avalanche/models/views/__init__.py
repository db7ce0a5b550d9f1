"""Modules wrapped around a backbone."""
