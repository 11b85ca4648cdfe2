"""Texts: read from files, made, and those that come with Python."""
