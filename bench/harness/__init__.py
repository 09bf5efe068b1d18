"""What the benchmarks share: options, gate, timing, shapes, providers, reports."""
