"""White balance: from a raw frame to the gains of red and blue."""
