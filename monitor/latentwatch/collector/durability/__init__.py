"""What the collector keeps on disk so that a kill loses nothing."""
