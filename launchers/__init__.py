"""Launchers that need no cluster."""
