"""Watching: taps, detectors, verdicts. Nothing is here yet; see README.md."""
