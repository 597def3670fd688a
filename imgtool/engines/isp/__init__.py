"""RAW Bayer mosaics to photographs."""
