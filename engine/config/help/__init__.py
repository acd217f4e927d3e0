"""What people ask of the settings: which there are, what one means, which one they meant."""
