"""Which machine runs it? Job specifications of cloud platforms, rendered from a recipe and checked before they cost."""
