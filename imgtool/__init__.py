"""Learned camera-image processing: one command line over five engines."""

__version__ = "0.1.0"
