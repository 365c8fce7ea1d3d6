"""A training step and its parts: loss, optimiser, schedule, average, augmentation."""
