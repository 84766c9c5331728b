"""Data sets: what they are made of, and a file for each family of them."""
