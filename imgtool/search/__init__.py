"""Searches: a space of settings, who proposes points of it, what a network costs, and the trials."""
