"""What leaves the collector: the one table of metrics, and the text that Prometheus reads."""
