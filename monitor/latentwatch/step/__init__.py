"""What one engine step showed, as numpy columns."""
