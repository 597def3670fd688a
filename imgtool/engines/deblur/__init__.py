"""Deblur: a U-Net that sharpens motion-blurred photos."""
