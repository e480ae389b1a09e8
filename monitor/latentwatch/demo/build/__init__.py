"""Training and measuring the demo's assets."""
