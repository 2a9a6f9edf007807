"""The study: what all workers share, and what a person sees of it."""
