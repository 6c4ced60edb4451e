"""What was asked for: every knob, its sections, the checked recipe, and the recipes that the package ships (`shipped/`).

This room imports no torch. A knob may be added, renamed or removed here; the other rooms only read its value."""
