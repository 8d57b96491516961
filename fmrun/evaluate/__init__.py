"""Generators scored against real images, upscalers against originals."""
