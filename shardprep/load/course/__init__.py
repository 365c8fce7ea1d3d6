"""Where a loader stands: epochs, iterations, positions, and the part of the data of a process."""
