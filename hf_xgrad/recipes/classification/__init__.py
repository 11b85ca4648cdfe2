"""GLUE, and other texts with labels."""
