"""The format as code: manifest, index, matrices, tar members, limits; it opens no file."""
