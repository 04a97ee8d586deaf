"""One attention, several backends: sight -> plain, xla, ... -> choice."""
