"""Benchmarks: one question, one script; `python -m benchmarks.NAME [--quick] --out FILE.json`."""
