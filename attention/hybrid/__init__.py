"""Exact attention in a window and to the text, a low-dimensional Taylor series for the rest."""
