"""What is searched, and how: spaces, priors, samplers, and who is stopped when. Mathematics; nothing here writes."""
