"""Everything around an optimizer step: options, selecting weights, writing records, containing faults."""
