"""A measured starter watchlist for a model: probes on contrast texts, and what they are worth beside the text alone."""
