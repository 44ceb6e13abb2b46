"""Tests of the files in cluster/: what they say, and what they start."""
