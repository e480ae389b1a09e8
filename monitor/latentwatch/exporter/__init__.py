"""The exporter: a process of its own beside the engine. Rows to requests, the books, the stream to the collector."""
