"""What forge claims in numbers, measured; README.md says what each file is and how to run it."""
