"""What trained generators make: grids, upscaled photographs, files for other programs."""
