"""The small models that are shipped, and how each was made."""
