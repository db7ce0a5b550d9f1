"""Readers that the scenarios share."""
