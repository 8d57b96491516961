"""What a caller of feature matching can get wrong."""


class FeatureMatchingError(ValueError):
    """Layers, weights or nets that do not fit each other; its text says what does."""
