"""Attention by tiles: exact near a query, one pseudo-key for every tile that is further away."""
