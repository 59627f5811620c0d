"""What a first reading skips: checks, files, text, and everything around the command line."""
