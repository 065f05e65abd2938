"""Which sequences a step computes, and which blocks they have. No torch."""
