"""Adapters: attach them so that the base can be brought back, unload them, give their memory back."""
