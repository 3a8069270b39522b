"""Models the loop can talk to: the embedded engine, and a scripted source that goes through the same token path."""
