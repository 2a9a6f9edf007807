"""K adapters trained in one pass on one frozen base."""
