"""Task families, one per file."""
