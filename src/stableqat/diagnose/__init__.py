"""Which layers rounding harms at which width, and the mixed widths that harm least at a given size."""
