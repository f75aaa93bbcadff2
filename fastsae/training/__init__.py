"""The parts of the trainer; the entry points are fastsae.data and fastsae.train."""
