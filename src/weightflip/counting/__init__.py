"""Count flips from codes: the tracker and its parts, one module each."""
