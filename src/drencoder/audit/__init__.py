"""Attacks on what the package releases: each leakage shown without protection, and measured with it."""
