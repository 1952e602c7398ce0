"""What a worker lends to its tasks: memory within a promise, a device, counts."""
