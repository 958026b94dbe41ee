"""Peers from other libraries: one module a library, imported by the families that compare with it.

A module offers builders as ``bench.harness.Case.peers`` wants them: a function that imports the library, prepares the
inputs in the library's best configuration and returns the call to time. It raises ``bench.harness.PeerMissing`` with
the reason where the library cannot run. How a library that a GPU machine lacks gets there: docs/gpu-run.md.
"""
