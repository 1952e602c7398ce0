"""What runs on a worker: parts and pieces of them, and what is said of one that fails."""
