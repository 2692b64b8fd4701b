"""Around one step: options, which weights are looked at, when counts are written, and what a fault may not do."""
