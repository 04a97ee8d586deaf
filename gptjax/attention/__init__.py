"""Attention backends behind one function; start with `mask`, then `dispatch`."""
