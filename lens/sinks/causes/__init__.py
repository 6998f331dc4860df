"""How a sink works: keys, gates, spectra, memory."""
