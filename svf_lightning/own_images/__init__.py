"""Your own images: read examples, check a folder, segment pictures."""
