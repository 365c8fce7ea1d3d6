"""A trained model as one object: embeds recordings and mels, compares and names speakers."""
