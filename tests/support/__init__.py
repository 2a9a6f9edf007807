"""The workshop that all tests share: one tool per file, each proven to detect what it is for."""
