"""Prompt pools and prefix tuning."""
