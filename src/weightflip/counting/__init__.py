"""Codes to counts: the tracker and its parts, one file each."""
