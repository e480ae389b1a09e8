"""Sidecars that report to a gateway, and the gateway that merges their reports."""
