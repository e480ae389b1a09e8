"""The part that runs inside vLLM's processes: plugin, hook, row map, hand-over to the ring. No gRPC, no threads."""
