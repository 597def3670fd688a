"""Lens: the distortion of a lens estimated from a photo, and the photo straightened."""
