"""One run, or many, from data to a judged adapter."""
