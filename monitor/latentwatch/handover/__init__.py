"""Everything that passes between an engine's process and the exporter's."""
