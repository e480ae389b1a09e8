"""The demo as it runs: processes, traffic, what is watched, the report."""
