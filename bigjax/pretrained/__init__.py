"""Weights of other libraries: read into the sharded state, and written as those libraries do."""
