"""Recorded faults: a trace as text becomes a list of accesses, is counted, and is simulated under other settings. docs/replay.md."""
