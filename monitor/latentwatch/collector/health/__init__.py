"""What may be wrong with the monitor itself: one table of causes, and what of it is so now."""
