"""Draws runs: the logged values of one or several enter, and a picture leaves."""
