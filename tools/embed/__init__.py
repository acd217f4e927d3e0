"""What tools.embed and tools.evaluate read, run and write."""
