"""Volumes on disk: readers of medical formats, the Zarr store, the index of cases (no torch)."""
