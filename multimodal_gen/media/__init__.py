"""Pixels to image files and back: encoding, recipes in metadata, file names that never clobber."""
