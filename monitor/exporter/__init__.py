"""The exporter: a process of its own beside the engine. Rows to requests, the books, and the stream to the collector."""
