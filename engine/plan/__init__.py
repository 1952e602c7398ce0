"""From a recipe and checkpoints' headers to a finished plan; reads no weight."""
