"""The compile gate: what must hold for the compiled kernels, the libraries and the wheel. See docs/compile-gate.md."""
