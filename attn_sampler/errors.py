"""What may go wrong while a model is decoded."""


class DecodingError(RuntimeError):
    """Decoding cannot go on: with this model, or by this policy."""
