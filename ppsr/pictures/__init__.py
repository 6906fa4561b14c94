"""Pictures in and out: reading, writing, enlarging in tiles, drawing the mask."""
